"""Qué curso busca un mensaje de WhatsApp: las palabras que importan, las que solo ordenan y el nivel."""

import difflib
import re
import unicodedata
from dataclasses import dataclass

NIVELES = ("basico", "intermedio", "avanzado")

# Palabras de cualquier mensaje de WhatsApp, que no dicen de qué es el curso.
VACIAS = frozenset(
    """
    a al ante asi algo algun alguna algunas alguno algunos aqui ahi cada como con cual cuales cuando cuanta
    cuantas cuanto cuantos de del desde donde e el ella ellos en entonces era es esa ese eso esos esta estan
    estas este esto estos fue ha haber han hasta hay la las le les lo los mas me mi mis mismo misma muy nada ni
    no nos o os otra otras otro otros pa para pero por porque pues que quien quienes se ser si sin sobre solo
    son su sus tal tambien te todas todo todos tu tus u un una uno unos vos y ya yo k x d p q
    pq xq tb

    hola ola holi hey bueno buena buenos buenas dia dias tarde tardes noche noches saludos gracias favor porfa
    porfavor plis pls xfa xfavor disculpa disculpe disculpen perdon oye oiga oigan ok okey vale listo claro jaja
    jajaja jeje osea ps che parce wey guey bro amigo amiga compa bb chamo epa senor senora senorita joven
    estimados

    quiero kiero qiero quisiera kisiera quiere quieren queremos queria deseo deseamos busco buscar buscando
    buscamos necesito necesita necesitamos ocupo interesa interesan interesaria interesado interesada gusta
    gustaria encantaria ando estoy soy somos estamos tengo tener tiene tienen tienes tenes teneis tendran habra
    hacer hago hacen haciendo saber saver sabe saben conocer ver poder podria podrian puede pueden puedo puedes
    podes dar da dan das den dame denme decir decirme dime digan diganme manda mandan mandar mandame manden pasa
    pasan pasar pasame pasen envia envian enviar enviame envien comparten compartir explicar explican contar
    cuentame regala regalas regalame ayuda ayudar ayudame ayudan sirve voy va van ir vi poner pongo entrar entro
    urge preguntar pregunta preguntas consultar consulta duda dudas

    info informacion informe informes detalle detalles anuncio publicacion curso cursos cursito curzo clase
    clases taller talleres diplomado diplomados capacitacion capacitaciones modulo formacion nivel niveles tema
    temas area areas opcion opciones oferta lista catalogo disponible disponibles completo estudiar estudio
    aprender aprendo aprenda aprendan aprendiendo tomar ensenan ensenar ensene ensenen dictan ofrecen ofrece
    imparten manejan venden inscribir inscribirme inscripcion inscripciones apuntar apuntarme

    cuesta cuestan costo costaria precio valor valen sale salen salir cobran pagar pago pagos pesos dolares
    soles euros barato barata baratos economico economicos caro gratis descuento promocion empieza empiezan
    empezar comienza comienzan inicia inician inicio arranca fecha fechas horario horarios hora horas duracion
    dura duran requisitos temario ano anos mes meses cupo lugar lugares queja quejas reclamo ubicacion direccion
    sucursal sucursales abren cierran telefono asesor llamar link liga

    corto corta cortos cortas breve

    mama papa hijo hija hijos tio tia esposo esposa hermano hermana novio sobrino sobrina

    the of for and course courses class classes i my want would like to learn do you have any how much is what
    when about please there are hello hi price cost um uma em voce voces vc tem aula aulas quanto custa preco
    gostaria quero obrigado
    """.split()
)

# Palabras que ordenan los resultados, pero no bastan para encontrar un curso.
DE_APOYO = frozenset(
    """
    zoom vivo semana semanas fin fines sabado sabados domingo domingos lunes martes miercoles jueves viernes
    manana mananas vespertino nocturno matutino maestro maestra profe profesor profesora docente hablar casa
    trabajar trabajando trabajo bien bonito bonita bonitos bonitas mejor rapido facil pronto hoy
    artesanal artesanales
    """.split()
)

# La modalidad ordena también, y encuentra cursos si no se pide nada más: "¿qué tienen en línea?".
MODALIDADES = {
    "linea": "linea online virtual virtuales remoto remota distancia",
    "presencial": "presencial presenciales",
    "hibrido": "hibrido hibrida hibridos semipresencial",
    "grabadas": "grabado grabados grabada grabadas",
}
_MODALIDAD = {palabra: nombre for nombre, palabras in MODALIDADES.items() for palabra in palabras.split()}

_NIVEL_DICHO = (
    ("intermedio", r"intermedi[oa]s?|nivel (?:2|dos|medio)|intermediate"),
    ("basico", r"(?:desde|de|a partir de) (?:0|cero)|basic[oa]s?|principiantes?|novat[oa]s?|iniciantes?|beginners?"
               r"|nivel (?:1|uno|inicial)|no (?:se|sabe|saben|sabemos) nada(?: de)?|sin (?:ninguna )?experiencia"
               r"|sin (?:ningun )?conocimientos?(?: previos?)?|nunca he|apenas (?:empiezo|estoy empezando)|empezando"),
    ("avanzado", r"avan[zc]ad[oa]s?|expert[oa]s?|nivel (?:3|tres|alto)|advanced"),
)  # fmt: skip
_NIVELES_DICHOS = tuple((nivel, re.compile(rf"\b(?:{patron})\b")) for nivel, patron in _NIVEL_DICHO)
# Quien ya sabe lo básico pide lo que sigue, si no dice otra cosa.
_YA_SABE = re.compile(
    r"(?<!no )(?<!ni )\b(?:(?:ya )?se|ya (?:manejo|domino|conozco|tengo|vi|hice|lleve|tome)) "
    r"(?:un poco )?(?:de )?(?:(?:el|lo) )?(?:nivel )?basico\b"
)
_OIDO = str.maketrans("vzk", "bsc")
_PALABRAS_DE_NIVEL = {
    palabra.translate(_OIDO): nivel
    for nivel, palabras in (
        ("basico", "basico basica principiante principiantes"),
        ("intermedio", "intermedio intermedia"),
        ("avanzado", "avanzado avanzada avanzados experto experta"),
    )
    for palabra in palabras.split()
}
# "unas" es también como se escribe "uñas" sin ñ: solo sobra delante de estas.
_SOBRA = re.compile(r"\bunas (?:clases?|preguntas?|informes|dudas?|fotos)\b")


# Un código como los escribe la gente, "exc 301" o "EXC-301"; el índice del catálogo los tiene como "codigoexc301".
_CODIGO = re.compile(r"\b([a-z]{2,5}) ?(\d{2,5})\b")


@dataclass(frozen=True)
class Pregunta:
    """Lo que dice un mensaje: las palabras que importan, las que solo ordenan y los niveles que nombra."""

    palabras: tuple[str, ...]
    de_apoyo: tuple[str, ...] = ()
    niveles: tuple[str, ...] = ()


def plano(texto: str) -> str:
    """Devuelve un texto en minúsculas, sin acentos ni signos, y sin las letras de más de "holaaaa"."""
    letras = unicodedata.normalize("NFKD", texto.lower())
    letras = "".join(letra for letra in letras if not unicodedata.combining(letra))
    return " ".join(re.findall(r"c\+\+|c#|[a-z0-9]+", re.sub(r"([a-z])\1{2,}", r"\1", letras)))


def entender(texto: str, limite: int = 20) -> Pregunta:
    """Devuelve qué se busca en un mensaje; de uno muy largo, en sus primeras `limite` palabras con sentido."""
    resto, ya_sabe = _YA_SABE.subn(" ", plano(texto[:1000]))
    niveles = []
    for nivel, patron in _NIVELES_DICHOS:
        resto, veces = patron.subn(" ", resto)
        niveles += [nivel] * bool(veces)
    palabras = [f"codigo{letras}{cifras}" for letras, cifras in _CODIGO.findall(resto)]
    de_apoyo, modalidades = [], []
    for palabra in _SOBRA.sub(" ", resto).split():
        if palabra in VACIAS:
            continue
        if palabra in _MODALIDAD:
            modalidades.append(_MODALIDAD[palabra])
        elif palabra in DE_APOYO or palabra.isdigit():
            de_apoyo.append(palabra)
        elif nivel_dicho := _nivel_mal_escrito(palabra):
            niveles.append(nivel_dicho)
        else:
            palabras.append(palabra)
    if ya_sabe and not niveles:
        niveles = ["intermedio"]
    if not palabras:
        palabras, modalidades = modalidades, []
    return Pregunta(tuple(palabras[:limite]), tuple((modalidades + de_apoyo)[:limite]), tuple(dict.fromkeys(niveles)))


def _nivel_mal_escrito(palabra: str) -> str | None:
    """Devuelve el nivel que nombra una palabra como "abansado", None si ninguno."""
    cerca = difflib.get_close_matches(palabra.translate(_OIDO), _PALABRAS_DE_NIVEL, 1, 0.82) if len(palabra) > 5 else []
    return _PALABRAS_DE_NIVEL[cerca[0]] if cerca else None
