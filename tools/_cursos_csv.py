"""Cargar el catálogo de cursos desde un CSV: leerlo con todos sus fallos, y guardarlo entero o nada."""

import argparse
import contextlib
import csv
import difflib
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from string import Template
from typing import Any

from tqdm import tqdm

from tools._cursos_pregunta import NIVELES, plano

Fila = dict[str, Any]
Consulta = Callable[..., list[Fila]]  # como Context.query: query(sql, **valores)


# --- Leer un CSV ------------------------------------------------------------------------------------------------------

OBLIGATORIAS = ("codigo", "nombre", "nivel", "precio")
MUCHOS = 500  # a partir de tantos cursos se muestra una barra de avance
LARGO = 10_000  # caracteres en una celda


@dataclass(frozen=True)
class Fallo:
    """Algo que hay que corregir en el archivo; sin columna ni valor si el fallo es de toda la línea."""

    linea: int
    motivo: str
    columna: str = ""
    valor: str = ""

    def __str__(self) -> str:
        donde = f"línea {self.linea}" + (f", columna {self.columna}" if self.columna else "")
        valor = self.valor if len(self.valor) <= 60 else self.valor[:59] + "…"
        return f"{donde}: " + (f"«{valor}» {self.motivo}" if self.columna else self.motivo)


class CatalogoError(Exception):
    """El archivo tiene fallos; `fallos` los tiene todos, en el orden de las líneas."""

    def __init__(self, fallos: Sequence[Fallo]):
        super().__init__("; ".join(map(str, fallos[:3])))
        self.fallos = list(fallos)


def _codigo(texto: str) -> str:
    codigo = texto.upper()
    if not re.fullmatch(r"[A-Z0-9]+([-_.][A-Z0-9]+)*", codigo) or len(codigo) > 40:
        raise ValueError("no es un código: usa letras sin acento, números y guiones, como EXC-101")
    return codigo


def _nombre(texto: str) -> str:
    if not texto or len(texto) > 200:
        raise ValueError("no es un nombre: escribe de 1 a 200 caracteres")
    return texto


def _nivel(texto: str) -> str:
    if (nivel := plano(texto)) not in NIVELES:
        raise ValueError(f"no es un nivel: usa {', '.join(NIVELES[:-1])} o {NIVELES[-1]}")
    return nivel


def _precio(texto: str) -> str | None:
    """Devuelve un precio como lo lee PostgreSQL; vale "1290", "1290.5", "$1,290.50" y "1.290,50"."""
    if plano(texto) in ("consultar", "a consultar"):
        return None
    cifras = re.sub(r"^\$ *", "", texto)
    if re.fullmatch(r"\d{1,3}(,\d{3})+(\.\d{1,2})?", cifras):
        cifras = cifras.replace(",", "")
    elif re.fullmatch(r"\d{1,3}(\.\d{3})+(,\d{1,2})?", cifras):
        cifras = cifras.replace(".", "")
    cifras = cifras.replace(",", ".")
    if not re.fullmatch(r"\d{1,8}(\.\d{1,2})?", cifras):
        raise ValueError("no es un precio: escribe un número como 1290 o 1290.50, 0 si es gratis, o «consultar»")
    return cifras


def _moneda(texto: str) -> str:
    if not re.fullmatch("[A-Z]{3}", moneda := texto.upper()):
        raise ValueError("no es una moneda: usa tres letras, como MXN, USD o EUR")
    return moneda


def _fechas(texto: str) -> list[str]:
    return sorted({_fecha(parte).isoformat() for parte in re.split(r"[|;,\s]+", texto) if parte})


def _fecha(texto: str) -> date:
    """Devuelve la fecha de "2027-01-16" o "16/01/2027"."""
    for patron, formato in ((r"\d{4}-\d\d-\d\d", "%Y-%m-%d"), (r"\d{1,2}/\d{1,2}/\d{4}", "%d/%m/%Y")):
        try:
            if re.fullmatch(patron, texto) and 2000 <= (dia := datetime.strptime(texto, formato).date()).year < 2100:
                return dia
        except ValueError:
            break
    raise ValueError(f"no son fechas, por «{texto}»: usa AAAA-MM-DD o DD/MM/AAAA, separadas por |")


def _enlace(texto: str) -> str:
    if texto and not re.fullmatch(r"https?://[^\s/]+\.\S+", texto):
        raise ValueError("no es un enlace: empieza por https:// y no lleva espacios")
    return texto


def _si_o_no(texto: str) -> bool:
    if (dicho := plano(texto)) not in ("", "si", "no", "1", "0", "true", "false", "verdadero", "falso"):
        raise ValueError("no dice si el curso está activo: usa sí o no")
    return dicho not in ("no", "0", "false", "falso")


# Las columnas que puede tener el archivo, con lo que hace de una celda un valor de JSON o dice por qué no se puede.
COLUMNAS: Mapping[str, Callable[[str], Any]] = {
    "codigo": _codigo,
    "nombre": _nombre,
    "area": str,
    "nivel": _nivel,
    "descripcion": str,
    "temario": str,
    "requisitos": str,
    "precio": _precio,
    "moneda": _moneda,
    "duracion": str,
    "modalidad": str,
    "sede": str,
    "horario": str,
    "docente": str,
    "fechas_inicio": _fechas,
    "enlace": _enlace,
    "palabras_clave": str,
    "activo": _si_o_no,
}


def leer(ruta: Path) -> list[Fila]:
    """Devuelve los cursos de un CSV, cada uno con las columnas que trae el archivo; lanza CatalogoError u OSError.

    El archivo está en UTF-8, con o sin BOM, y separa por comas, punto y coma o tabuladores, o por lo que diga la línea
    `sep=` con que empiezan los de Excel.
    """
    texto = _texto(ruta.read_bytes())
    fallos: list[Fallo] = []
    lineas = _lineas(_lector(texto), fallos)
    numero, encabezado = next(lineas, (1, []))
    if fallos:
        raise CatalogoError(fallos)
    columnas = _columnas(encabezado)
    fallos += _fallos_del_encabezado(numero, columnas)
    cursos = []
    if set(columnas) & COLUMNAS.keys():
        cursos = _cursos(_avance(lineas, texto.count("\n"), "Revisando"), columnas, fallos)
    if not cursos and not fallos:
        fallos.append(Fallo(numero, "después del encabezado no hay ningún curso"))
    if fallos:
        raise CatalogoError(fallos)
    return cursos


def _texto(contenido: bytes) -> str:
    """Devuelve el texto de un archivo en UTF-8, sin BOM; lanza CatalogoError si no es un CSV en esa codificación."""
    if contenido.startswith((b"PK\x03\x04", b"\xd0\xcf\x11\xe0")):  # como empiezan .xlsx y .xls
        motivo = "es un libro de Excel, no un CSV: ábrelo y usa Archivo > Guardar como > «CSV UTF-8»"
        raise CatalogoError([Fallo(1, motivo)])
    if contenido.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise CatalogoError([Fallo(1, "el archivo está en UTF-16: guárdalo como «CSV UTF-8»")])
    try:
        texto = contenido.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        linea = contenido.count(b"\n", 0, error.start) + 1
        principio = contenido.rfind(b"\n", 0, error.start) + 1
        parte = contenido[principio : error.start + 12].decode("cp1252", "replace").strip()[-40:]
        motivo = f"el archivo no está en UTF-8, parece Latin-1 (Windows-1252), por «{parte}»: guárdalo como «CSV UTF-8»"
        raise CatalogoError([Fallo(linea, motivo)]) from None
    if "\0" in texto:
        raise CatalogoError([Fallo(texto.count("\n", 0, texto.index("\0")) + 1, "hay un carácter nulo: no es un CSV")])
    return texto


def _lector(texto: str) -> Any:
    """Devuelve el lector de un CSV con el separador que se ve en su primera línea escrita, o el que dice `sep=`."""
    primera = next((linea for linea in texto.splitlines() if re.search(r"\w", linea)), "")
    dicho = re.fullmatch(r'"?sep=([^\w"])"?\s*', primera, re.IGNORECASE)
    if dicho:
        texto = texto.replace(primera, "", 1)  # queda en blanco: las demás conservan su número
    separador = dicho[1] if dicho else max(",;\t", key=primera.count)
    return csv.reader(io.StringIO(texto, newline=""), delimiter=separador, strict=True)


def _lineas(lector: Any, fallos: list[Fallo]) -> Iterator[tuple[int, list[str]]]:
    """Da cada fila que no está en blanco, con la línea en que empieza; añade a `fallos` las que no se pueden leer."""
    while True:
        linea = lector.line_num + 1
        try:
            celdas = [celda.strip() for celda in next(lector)]
        except StopIteration:
            return
        except csv.Error as error:
            fallos.append(Fallo(linea, f"no se puede leer, ¿unas comillas sin cerrar? ({error})"))
            continue
        if any(celdas):
            yield linea, celdas


def _columnas(encabezado: Sequence[str]) -> list[str]:
    """Devuelve las columnas de un encabezado, sin las que Excel deja vacías al final."""
    columnas = [plano(nombre).replace(" ", "_") for nombre in encabezado]
    while columnas and not columnas[-1]:
        columnas.pop()
    return columnas


def _fallos_del_encabezado(linea: int, columnas: Sequence[str]) -> list[Fallo]:
    """Devuelve qué columnas faltan, sobran o se repiten."""
    fallos = [Fallo(linea, f"falta la columna {columna}") for columna in OBLIGATORIAS if columna not in columnas]
    for columna in dict.fromkeys(filter(None, columnas)):
        if columna not in COLUMNAS:
            cerca = difflib.get_close_matches(columna, COLUMNAS, 1)
            consejo = f"¿es {cerca[0]}?" if cerca else "las que hay son " + ", ".join(COLUMNAS)
            fallos.append(Fallo(linea, f"no es una columna del catálogo: {consejo}", "del encabezado", columna))
        elif columnas.count(columna) > 1:
            fallos.append(Fallo(linea, "está dos veces", "del encabezado", columna))
    return fallos


def _cursos(lineas: Iterable[tuple[int, list[str]]], columnas: Sequence[str], fallos: list[Fallo]) -> list[Fila]:
    """Devuelve los cursos de las filas y añade a `fallos` los de cada una, y los códigos que se repiten."""
    cursos: list[Fila] = []
    vistos: dict[str, int] = {}
    for linea, celdas in lineas:
        curso = _curso(linea, columnas, celdas, fallos)
        clave = re.sub(r"\W|_", "", curso.get("codigo", ""))
        if clave and vistos.setdefault(clave, linea) != linea:
            fallos.append(Fallo(linea, f"repite el código de la línea {vistos[clave]}", "codigo", curso["codigo"]))
        cursos.append(curso)
    return cursos


def _curso(linea: int, columnas: Sequence[str], celdas: Sequence[str], fallos: list[Fallo]) -> Fila:
    """Devuelve el curso de una fila y añade a `fallos` los suyos; de una columna que no conoce no dice nada."""
    sobran = celdas[len(columnas) :]
    if len(celdas) < len(columnas) or any(sobran):
        motivo = f"tiene {len(celdas)} celdas y el encabezado {len(columnas)}: ¿faltan unas comillas?"
        fallos.append(Fallo(linea, motivo))
        return {}
    curso: Fila = {}
    for columna, celda in zip(columnas, celdas, strict=False):
        try:
            if len(celda) > LARGO:
                raise ValueError(f"es demasiado largo: caben {LARGO} caracteres")
            if not columna and celda:
                raise ValueError("está en una columna sin nombre")
            if columna in COLUMNAS:
                curso[columna] = COLUMNAS[columna](celda)
        except ValueError as error:
            fallos.append(Fallo(linea, str(error), columna or "sin nombre", celda))
    return curso


def _avance(cosas: Iterable[Any] | None, total: int, que: str) -> Any:
    """Devuelve lo mismo que recibe, con una barra de avance en stderr si es mucho."""
    return tqdm(cosas, que, total, file=sys.stderr, unit=" cursos", disable=total < MUCHOS)


# --- Guardar el catálogo ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resumen:
    """Qué pasó con los cursos de un archivo."""

    nuevos: int = 0
    actualizados: int = 0
    sin_cambios: int = 0

    def __add__(self, otro: "Resumen") -> "Resumen":
        return Resumen(
            self.nuevos + otro.nuevos, self.actualizados + otro.actualizados, self.sin_cambios + otro.sin_cambios
        )

    def __str__(self) -> str:
        return f"nuevos: {self.nuevos}, actualizados: {self.actualizados}, sin cambios: {self.sin_cambios}"


# SQL hecho solo con nombres de COLUMNAS: las que no trae el archivo se quedan como estaban, o con su valor por omisión.
_GUARDAR = Template("""
    INSERT INTO cursos ($columnas)
    SELECT $columnas FROM jsonb_to_recordset(CAST(:cursos AS jsonb)) AS dado ($tipos)
    ON CONFLICT (clave) DO UPDATE SET ($columnas) = ROW($nuevas) WHERE ROW($viejas) IS DISTINCT FROM ROW($nuevas)
    RETURNING xmax = 0 AS nuevo""")
_TIPOS = {"precio": "numeric", "fechas_inicio": "date[]", "activo": "boolean"}


def cargar(query: Consulta, ruta: Path) -> Resumen:
    """Carga un CSV en un catálogo vacío, con una sola sentencia; en uno que ya tiene cursos no hace nada."""
    if query("SELECT 1 AS hay FROM cursos LIMIT 1"):
        return Resumen()
    return _guardar(query, leer(ruta))


def actualizar(query: Consulta, cursos: Sequence[Fila], lote: int = 200) -> Resumen:
    """Inserta o actualiza los cursos que da `leer`, por lotes: `query` ha de estar dentro de una transacción."""
    resumen = Resumen()
    with _avance(None, len(cursos), "Guardando") as barra:
        for desde in range(0, len(cursos), lote):
            parte = cursos[desde : desde + lote]
            resumen += _guardar(query, parte)
            barra.update(len(parte))
    return resumen


def _guardar(query: Consulta, cursos: Sequence[Fila]) -> Resumen:
    """Inserta o actualiza unos cursos con una sentencia; todos tienen las mismas columnas."""
    columnas = list(cursos[0])
    sql = _GUARDAR.substitute(
        columnas=", ".join(columnas),
        tipos=", ".join(f"{columna} {_TIPOS.get(columna, 'text')}" for columna in columnas),
        viejas=", ".join(f"cursos.{columna}" for columna in columnas),
        nuevas=", ".join(f"excluded.{columna}" for columna in columnas),
    )
    escritos = query(sql, cursos=json.dumps(cursos))
    nuevos = sum(fila["nuevo"] for fila in escritos)
    return Resumen(nuevos, len(escritos) - nuevos, len(cursos) - len(escritos))


def _a_la_base(cursos: Sequence[Fila]) -> tuple[Resumen, int]:
    """Guarda los cursos en la base de DATABASE_URL o la incluida; devuelve qué pasó y cuántos hay en el catálogo."""
    from database import Database, migrate
    from settings import load_settings

    ajustes = load_settings()
    with contextlib.ExitStack() as al_final:
        if ajustes.database_url:
            url = ajustes.database_url.get_secret_value()
        else:
            import localdb

            url = al_final.enter_context(localdb.start(Path(".data"))).url
        migrate(url)
        base = Database(url, 1)
        al_final.callback(base.close)
        with base.connection() as conexion:
            return _en_una_transaccion(conexion, cursos)


def _en_una_transaccion(conexion: Any, cursos: Sequence[Fila]) -> tuple[Resumen, int]:
    """Guarda los cursos en una transacción de una conexión de pg8000; si falla, no queda nada."""

    def query(sql: str, **valores: Any) -> list[Fila]:
        filas = conexion.run(sql, **valores)
        nombres = [columna["name"] for columna in conexion.columns or ()]
        return [dict(zip(nombres, fila, strict=True)) for fila in filas or ()]

    conexion.run("BEGIN")
    try:
        conexion.run("LOCK TABLE cursos IN SHARE ROW EXCLUSIVE MODE")  # de dos cargas a la vez, una espera
        resumen = actualizar(query, cursos)
        total = query("SELECT count(*) AS cursos FROM cursos")[0]["cursos"]
    except BaseException:
        with contextlib.suppress(Exception):  # sin conexión, la base la deshace sola
            conexion.run("ROLLBACK")
        raise
    conexion.run("COMMIT")
    return resumen, total


def main(argumentos: Sequence[str] | None = None) -> int:
    """Carga un catálogo desde la línea de órdenes; devuelve 0, o 1 si no se guardó nada."""
    parser = argparse.ArgumentParser("python -m tools.cursos", description="Carga o actualiza el catálogo de cursos.")
    parser.add_argument("archivo", type=Path, help="un CSV en UTF-8 con las columnas de tools/cursos.csv")
    parser.add_argument("--revisar", action="store_true", help="revisa el archivo sin guardar nada")
    opciones = parser.parse_args(argumentos)
    try:
        cursos = leer(opciones.archivo)
        if opciones.revisar:
            print(f"{opciones.archivo}: cursos sin fallos: {len(cursos)}")
            return 0
        resumen, total = _a_la_base(cursos)
    except CatalogoError as error:
        _contar_fallos(opciones.archivo, error.fallos)
    except FileNotFoundError as error:
        print(f"No existe el archivo {error.filename}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\nInterrumpido: no se guardó nada.", file=sys.stderr)
    except Exception as error:  # de la lectura, los ajustes o la base: una línea basta para saber qué hacer
        print(f"{opciones.archivo}: no se guardó nada: {error}", file=sys.stderr)
    else:
        print(f"{opciones.archivo}: {resumen}")
        if total > len(cursos):
            print(f"Cursos del catálogo que no están en el archivo y siguen como estaban: {total - len(cursos)}")
        return 0
    return 1


def _contar_fallos(ruta: Path, fallos: Sequence[Fallo], muestra: int = 50) -> None:
    """Escribe los fallos de un archivo en stderr, los primeros `muestra` uno por uno."""
    for fallo in fallos[:muestra]:
        print(f"{ruta}: {fallo}", file=sys.stderr)
    if len(fallos) > muestra:
        print(f"{ruta}: … y otros {len(fallos) - muestra}", file=sys.stderr)
    print(f"{ruta}: fallos: {len(fallos)}; no se guardó nada.", file=sys.stderr)
