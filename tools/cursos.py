"""El catálogo de cursos: buscarlo, ofrecerlo al asistente como herramientas y cargarlo desde un CSV.

    python -m tools.cursos catalogo.csv            # carga o actualiza: o todo, o nada
    python -m tools.cursos catalogo.csv --revisar  # solo revisa el archivo

La tabla, lo que se busca de cada curso y cómo se puntúa están en `schema.sql`, en la sección del catálogo.
"""

import difflib
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import Field

from tools import Context, ToolError, hookimpl
from tools._cursos_csv import Consulta, Fila, cargar, main
from tools._cursos_pregunta import Pregunta, entender, plano

__all__ = ["areas", "buscar", "cargar", "cercanos", "codigos_cercanos", "detalle", "precio_legible"]


# --- El catálogo ------------------------------------------------------------------------------------------------------

_RESUMEN = """
    SELECT codigo, nombre, area, nivel, precio, moneda, duracion, modalidad, {puntaje} AS puntaje,
        (SELECT min(dia) FROM unnest(fechas_inicio) AS dia WHERE dia >= current_date) AS proxima_fecha
    FROM """

BUSCAR = (
    _RESUMEN.format(puntaje="puntaje")
    + """cursos_buscar(CAST(:palabras AS text[]), CAST(:de_apoyo AS text[]), CAST(:niveles AS text[]),
        CAST(:estricto AS boolean), CAST(:minimo AS real)) JOIN cursos USING (codigo)
    ORDER BY puntaje DESC, proxima_fecha, codigo LIMIT CAST(:limite AS int)"""
)

DEL_NIVEL = (
    _RESUMEN.format(puntaje="1::real")
    + """cursos WHERE activo AND nivel = ANY (CAST(:niveles AS text[]))
    ORDER BY proxima_fecha, codigo LIMIT CAST(:limite AS int)"""
)

DETALLE = """
    SELECT codigo, nombre, area, nivel, descripcion, temario, requisitos, precio, moneda, duracion, modalidad, sede,
        horario, docente, enlace,
        ARRAY(SELECT dia FROM unnest(fechas_inicio) AS dia WHERE dia >= current_date ORDER BY dia) AS fechas_inicio
    FROM cursos WHERE activo AND clave = upper(replace(cursos_plano(:codigo), ' ', ''))"""

AREAS = "SELECT area, count(*) AS cursos FROM cursos WHERE activo AND area <> '' GROUP BY area ORDER BY 2 DESC, 1"


def buscar(query: Consulta, texto: str, nivel: str | None = None, limite: int = 5) -> list[Fila]:
    """Devuelve los cursos que responden a un mensaje, el mejor primero; [] si ninguno.

    Con `nivel` (uno de NIVELES), solo los de ese nivel. Un nivel dicho en el texto es una preferencia: si de ese no
    hay, salen los demás. Cada fila tiene codigo, nombre, area, nivel, precio (Decimal; None: a consultar), moneda,
    duracion, modalidad, proxima_fecha (date o None) y puntaje (de 0 a 1: cuánto tiene de lo pedido).
    """
    pregunta = entender(texto)
    niveles = [nivel] if nivel else list(pregunta.niveles)
    if pregunta.palabras:
        return _buscar(query, pregunta, niveles, bool(nivel), 0.3, limite)
    return query(DEL_NIVEL, niveles=niveles, limite=limite) if niveles else []


def cercanos(query: Consulta, texto: str, limite: int = 3) -> list[Fila]:
    """Devuelve lo más cercano a lo que `buscar` no encontró, de cualquier nivel, con las mismas columnas."""
    pregunta = entender(texto)
    return _buscar(query, pregunta, list(pregunta.niveles), False, 0.1, limite) if pregunta.palabras else []


def _buscar(
    query: Consulta, pregunta: Pregunta, niveles: list[str], estricto: bool, minimo: float, limite: int
) -> list[Fila]:
    return query(
        BUSCAR,
        palabras=list(pregunta.palabras),
        de_apoyo=list(pregunta.de_apoyo),
        niveles=niveles,
        estricto=estricto,
        minimo=minimo,
        limite=limite,
    )


def areas(query: Consulta) -> list[Fila]:
    """Devuelve las áreas del catálogo y cuántos cursos tiene cada una (area, cursos), la mayor primero."""
    return query(AREAS)


def detalle(query: Consulta, codigo: str) -> Fila | None:
    """Devuelve todo lo de un curso, None si no existe; del código no importan mayúsculas, espacios ni guiones.

    Además de lo de `buscar`: descripcion, temario, requisitos, sede, horario, docente, enlace y, en vez de
    proxima_fecha, fechas_inicio (list[date], solo las que vienen).
    """
    # Lo demás no es de un código, y PostgreSQL no admite ni un carácter nulo ni medio emoji.
    return next(iter(query(DETALLE, codigo=re.sub(r"[^\w+#]", "", codigo))), None)


def codigos_cercanos(query: Consulta, codigo: str, limite: int = 3) -> list[Fila]:
    """Devuelve los cursos (codigo, nombre…) que quiso decir quien escribió un código que no existe, o un nombre."""
    cursos = query("SELECT codigo, nombre, clave FROM cursos WHERE activo ORDER BY clave")
    por_clave = {curso["clave"]: curso for curso in cursos}
    escrito = plano(codigo).replace(" ", "").upper()
    claves = difflib.get_close_matches(escrito, por_clave, limite, 0.6)
    return [por_clave[clave] for clave in claves] or buscar(query, codigo, limite=limite)


def precio_legible(precio: Decimal | None, moneda: str) -> str:
    """Devuelve un precio para leer: "$1,290 MXN", "gratis" o "a consultar"."""
    if precio is None:
        return "a consultar"
    if not precio:
        return "gratis"
    return f"${precio:,.2f} {moneda}".replace(".00 ", " ")


# --- Las herramientas del asistente -----------------------------------------------------------------------------------


def buscar_curso(
    context: Context,
    nombre: Annotated[str, Field(description="De qué es el curso, con las palabras del usuario")],
    nivel: Annotated[
        Literal["basico", "intermedio", "avanzado"] | None,
        Field(description="Solo si el usuario pide un nivel: basico también es desde cero o principiante"),
    ] = None,
    limite: Annotated[int, Field(description="Cuántos cursos como mucho, de 1 a 10")] = 5,
) -> dict[str, Any]:
    """Busca en el catálogo los cursos de un tema y da código, nivel, precio, modalidad y próxima fecha de cada uno.

    Entiende faltas de ortografía y sinónimos. Si no hay ninguno dice cuáles son los más cercanos y de qué áreas hay
    cursos: ofrécelos como alternativa, no como si fueran lo pedido. Para temario, requisitos, horario, docente o enlace
    usa detalle_curso con el código.
    """
    hallados = buscar(context.query, nombre, nivel, max(1, min(limite, 10)))
    if hallados:
        return {"cursos": [_breve(curso) for curso in hallados]}
    if entender(nombre).palabras:
        aviso = f"No hay ningún curso de «{nombre[:80]}»" + (f" de nivel {nivel}." if nivel else ".")
    else:
        aviso = "Falta decir de qué tema; estas son las áreas."
    return {
        "cursos": [],
        "aviso": aviso,
        "cercanos": [_breve(curso) for curso in cercanos(context.query, nombre)],
        "areas": [area["area"] for area in areas(context.query)],
    }


def detalle_curso(
    context: Context,
    codigo: Annotated[str, Field(description="El código que dio buscar_curso, como EXC-101")],
) -> dict[str, Any]:
    """Da todo lo que se sabe de un curso: precio, próximas fechas, horario, duración, modalidad, sede, docente,
    temario, requisitos y enlace para inscribirse. Lo que no aparece, no se sabe.
    """
    curso = detalle(context.query, codigo)
    if curso is None:
        parecidos = "; ".join(f"{c['codigo']} ({c['nombre']})" for c in codigos_cercanos(context.query, codigo))
        consejo = f"Los más parecidos: {parecidos}." if parecidos else "Busca el curso con buscar_curso."
        raise ToolError(f"No existe el curso «{codigo[:60]}». {consejo}")
    curso["fechas_inicio"] = [dia.isoformat() for dia in curso["fechas_inicio"]] or "por confirmar"
    curso["precio"] = precio_legible(curso["precio"], curso.pop("moneda"))
    return {campo: valor for campo, valor in curso.items() if valor}


def _breve(curso: Fila) -> Fila:
    """Devuelve de un curso hallado lo que cabe en una lista, como texto."""
    fecha = curso["proxima_fecha"]
    return {
        "codigo": curso["codigo"],
        "nombre": curso["nombre"],
        "nivel": curso["nivel"],
        "precio": precio_legible(curso["precio"], curso["moneda"]),
        "modalidad": curso["modalidad"],
        "proxima_fecha": fecha.isoformat() if fecha else "por confirmar",
    }


@hookimpl
def register_tools(register: Callable[..., Any]) -> None:
    register(buscar_curso)
    register(detalle_curso)


if __name__ == "__main__":
    raise SystemExit(main())
