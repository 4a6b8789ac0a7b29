"""What a user's turn says, for the traditional flow: courtesies, questions about a course, and what to search for.

Recognition is data: a table of expressions over words in lower case without accents, in Spanish as it is typed in a
hurry, English and Portuguese. A team adds a word to a row, or a row, and nothing else changes.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from tools import _cursos_pregunta

PALABRAS = 120  # words of a turn that are read
LISTA = 5  # courses in one answer
TACHADA = "·"  # stands for a word that a row has taken


# --- The words that are understood ----------------------------------------------------------------------------

# A name and an expression a row; a line that begins with blanks goes on with the row above.
# From top to bottom: words that one row has taken are gone for the rows below; those that no row takes and that are
# not empty (VACIAS) are searched for.
PATRONES = r"""
presentacion  (me llamo|mi nombre es|my name is|me chamo|meu nome e) \w+( (?!y\b|e\b|and\b|quiero\b)[a-z]{3,})?
presentacion  soy( de)? (?!principiante|novat|nuev)\w+|mucho gusto
precio        a como( (esta|es|sale))?
como_estas    (como|q tal|que tal) (estas|esta usted|estan|te va|le va|les va|andas?|andan|va todo)|como vai
como_estas    tudo bem|how are you( doing| today)?
gracias       (much[ai]s? |mil |muito |ok )?
              (gra[csz]+ias|grac|grax|grcs|thanks|thank you|thx|obrigad[oa]|obg|valeu)
              ( (por todo|por (la|tu|su) \w+|a ti|so much|very much))*
gracias       agradec\w+|muy amable|se agradece
espera        (dame|deme|denme|esperame|dejame|un|aguanta|so) (um? )?(momento|momentito|segundito|minuto|rato|seg)
espera        espera(me|te)?|(dejame|deja|deixa eu) (ver|pensar|consultar|revisar|checar)(lo)?|un segundo
espera        lo (voy a pensar|pienso)|(luego|ahorita|despues) (te|les) (digo|aviso|escribo)|(te|les) aviso
espera        (wait|hold on)( a)?( moment| minute| second)?|one moment
despedida     adios\w*|chau+|chao|bye+|goodbye|see you( later| soon)?|tchau|ate (logo|mais|amanha)|nos vemos
despedida     (me )?equivo\w+ de (numero|chat|persona|contacto)|numero equivocado|wrong number
despedida     hasta (luego|pronto|manana|la vista|la proxima)|(un )?buen (fin de semana|finde|fin)
despedida     que (estes?|tengas?|tenga) (muy )?\w+( (dia|tarde))?|(eso|es) (es |seria )?todo
duda          (tengo )?(una |unas )?(otra )?(dudas?|preguntas?|consultas?)|(quick )?question|uma (duvida|pergunta)

detalle       (vi|mire|encontre|me salio) (su|el|un|una|este) (anuncio|publicacion|post|pagina)
              ( (en|de|por) (facebook|face|fb|instagram|insta|ig|tiktok|internet|redes|google)( sociales)?)?
ya_sabe       (?<!no )(?<!ni )((ya )?se|ya (manejo|domino|conozco|tengo|vi|hice|lleve|tome)) (un poco )?(de )?
              ((el|lo) )?(nivel )?[bv]asico
facil         (cual (es|seria) )?(el )?mejor (para (empezar|comenzar|principiantes)|si no se nada)
recomienda    (que|q|cual|cuales|what|which)? ?(curso |uno |one )?(me |nos |do you )?(recomiend\w+|sugier\w+|convien\w+)
recomienda    no se (que|cual|por cual|a cual) (estudiar|tomar|elegir|escoger|hacer|aprender|curso\w*)( (tomar|elegir))?
recomienda    (cual|que) (es|seria) (el )?(mejor|bueno)|(el |cual es el |la )?mejor( curso| opcion)?$|recommend\w*
quien_soy     (eres|es|sos|hablo con|e|are you)( una?| a)? (bot|robot|humano|persona|maquina|human|real)
              ( real| de verdad| humana?)?|robot|bot
quien_soy     (con )?quien (eres|sos|hablo|habla|es usted)|quem (e voce|fala)|como te llamas|who are you
asesor        ((hablar|chatear|comunic\w+|contact\w*|falar|talk|speak) (con |com |a |to |with )?)?(una? |el |la |an )?
              (ase[sc]or(a|es|as|ia)?|aseror|atendentes?|consultor(a|es)?|advis[oe]rs?|ejecutiv[oa]s?)
asesor        (hablar|chatear|comunic\w+|contact\w*|falar|talk|speak)( con| com| a| to| with)?
               (alguien|algu?em|someone|(un |una |uma? |a |la )?(persona|pessoa|person|human[oa]?|agente|encargad[oa]))
asesor        (persona|pessoa|agente) (real|de verdad|humana?)|un (agente|vendedor|representante|humano)
asesor        (me )?(pueden|puede|podrian) (llamar|marcar)(me)?|llamenme|me (llaman|marcan)|que me llamen
asesor        (su|un|algun|tienen|hay|numero de|el|your) (numero de )?(tel(efono)?|whats?app|correo|contacto|phone)
asesor        (?<!aprender a )(cancel(ar|o|en|arlo|acion|aciones)|anular|cancelamento|cancel)( (mi|el|la|un|my|minha))?
              ( (cursos?|inscripcion|registro|lugar|pago|clases?|enrollment|inscricao))?
asesor        (me )?(puedo|puede|quiero|quisiera|podria) (salirme|retirarme|darme de baja|dejar el curso)
asesor        me (puedo|quiero|podria) salir|dar(me|se)? de baja|cambiar(me)? de (curso|grupo|horario|fecha)
asesor        (pedir |quiero |un |el |la |mi )*(reembols\w*|devoluci\w*|refunds?|reintegro|estorno)|money back
asesor        (me |que |nos )*(devuelv\w+|regres\w+|reintegr\w+|devolver) (el|mi|la|lo|todo) ?(mi |el )?
              (dinero|plata|lana|pago|que pague|importe)|(el|mi) dinero de vuelta
asesor        me cobraron (doble|de mas|dos veces|otra vez|mal)|(doble cobro|cobro (doble|duplicado|indebido))
asesor        (el |mi |la |un |su )?(pago|tarjeta|links?|enlace|liga|pagina|sitio) no (me |se |lo )?
              (pasa|paso|entra|abre|sirve|funciona|carga|jala|deja|aparece|refleja|reconoce)
asesor        (rechaz\w+ (mi|el|la) (pago|tarjeta)|no (puedo|me deja) (pagar|inscribirme|entrar))
asesor        (quiero |quisiera |busco |me gustaria |puedo )*((trabajar|colaborar) (con|para) (ustedes|uds)|dar clases)
asesor        (hablar|aclarar|aclaracion|problemas?) (de|del|con|sobre)( (el|mi|un))? (pago|cobro|cargo)
asesor        bolsa de trabajo|mi (cv|curriculum)
queja         (es|son|parecen?|esto es|puros?|un|unos|una|que) (un |una |unos |puros )?
              (robos?|fraudes?|rater[oa]s?|ladron(es|as?)?|rat[ao]s|estafador\w*|enganos?|burla|transas?)( esto)?
queja         ^(robo|fraude|rateros|ladrones)$|me (robaron|estafaron|enganaron|tomaron el pelo)
queja         (l[oe]s |a )?(voy a |pienso )?(demandar|denunciar)(l[oe]s)?|profeco|indecopi|con (mi|un) abogad[oa]
queja         (nadie|no) (me )?(responden?|contestan?|atienden?|ayudan?)|(que )?mal(isimo)? servicio|que mal
queja         quejas?|reclam(o|os|ar)|estafa\w*|horrible|inutil\w*|no (me )?sirve[ns]?|malisim\w+|pesim\w+

facil         (el |la |lo |algo )?mas (facil|sencill[oa]|basic[oa])(es)?|easiest|mais facil
precio        (es|son) (gratis|gratuit[oa]s?)
gratis        gratis|gratuit[oa]s?|free|sin costo|de gracia
barato        (de )?menor precio|cheap(er|est)?|mais barato
barato        (el |la |lo |los |las |algo |algun[oa] )?mas (barat|economic)[oa]s?|(algo )?(barat|economic)[oa]s?
caro          (el |la |lo |los |las |cual es el )?mas (car|costos)[oa]s?|most expensive|mais caros?
corto         (el |la |algo )?(mas )?(cort[oa]|rapid[oa]|breve)s?|shortest|mais curto
pronto        (me urge )?(empezar |comenzar |iniciar )?(esta|la proxima|la otra) semana|(este|el proximo|el otro) mes
pronto        cuanto antes|lo antes posible|ya mismo|hoy mismo|as soon as possible
pronto        (el |la |cual )?(que )?(empieza|inicia|comienza) (mas pronto|antes|primero)|el mas (proximo|cercano)
detalle       (mas )?(informes?|infos?|informacion|informacoes|detalles?|datos|details)|saber mas|more info\w*
detalle       (me )?(cuenta|cuentame|dime|platicame|hablame|explicame) (mas|todo)|tell me more|de que (se )?trata
mas           (ver|muestra\w*|mostrar|ensename|dame|quiero|hay|tienen|tienes|y|que|cuales|algun[oa]s?)
               (algo )?(mas|otr[oa]s)( (cursos|opciones|temas|alternativas|tienen|hay|ofrecen))*
mas           (l[oa]s )?otr[oa]s$|(mas|otr[oa]s) (cursos|opciones|alternativas)|(show me )?more( courses| options)?
mas           outr[oa]s( cursos)?
catalogo      cual(es)?$|(todo )?lo que (tienen|hay|ofrecen)
catalogo      (cuantos|how many|quantos) (cursos|talleres|courses)( (tienen?|tienes|hay|ofrecen|dan|son|do you have))*
catalogo      (que|q|ke|k|cuales|quais|what|which)( son)?( los| otros| os| sao os)?
               (cursos?|talleres|diplomados|capacitaciones|clases|carreras|opciones|courses)
              ( (tienen?|tienes|tenes|hay|ofrecen|dan|manejan|imparten|estan|do you have|are there|disponibles))*
catalogo      (que|q|ke|k) (tienen?|tienes|tenes|ofrecen|dan|ensenan|manejan|venden|hay)( disponibles?)?|catalogos?
catalogo      oferta (academica|educativa|de cursos)|cursos (disponibles|que (tienen|ofrecen|dan))
catalogo      (lista|listado) de( los)? cursos|(ver |todos )+(todos |los |sus )*cursos|all (the |your )?courses|todos$

enlace        links?|enlaces?|(la|su|una|tienen|your) (pagina( web)?|sitio web|website)
atencion      (a que h?ora |hasta que h?ora )?(abren|cierran|atienden)|(estan )?abiertos?|horarios? de atencion
horario       h?orarios?|(que|q|k) (dias?|horas?)|a que h?ora|turnos?
horario       (los )?(fin(es)? de semana|lunes|martes|miercoles|jueves|viernes|sabados?|domingos?)
horario       entre semana|((en|por|de) )?(la (manana|tarde|noche)|las (mananas|tardes|noches))
horario       (matutin|vespertin|nocturn)[oa]s?|timetables?|schedules?|weekends?|what time
duracion      cuant[oa]s? (\w+ )?(duran?|tiempo|tarda\w*|horas?|semanas?|mes(es)?|clases|sesiones)( (dura|es|son))?
duracion      (la )?dura(cion|n)?|how long( is it| does it (take|last))?|quanto tempo( dura)?
comprobante   (el |mi |un )?(comprobante|voucher|recibo de pago)|ya (pague|deposite|transferi|hice el pago)
pago          (formas?|metodos?|opciones|medios) de (pago|pagamento)|financia(miento|n)|parcel(ar|as|ado)
pago          (donde |como )?(se |lo |los |te |les )?pag(o|a|as|os|ar|arlo|arles|amos|amento|aria)|pay(ments?)?
pago          (con |por |en |a )?(tarjetas?|transferencia|deposit[oa]\w*|oxxo|paypal|efectivo|mercado ?pago|plazos
              |cuotas|mensualidades|abonos|meses( sin intereses)?|msi|pix|boleto|cartao|credit card|cash|yape|nequi
              |pse|spei)( de credito| de debito)?
precio        (a |en )?cuant[oa]s? (\w+ ){0,2}(cue[szc]t\w*|vale\w*|sale\w*|es|seria|cobran?|esta|estan|son|anda|queda)
precio        pre[csz]+i?os?|(?<!de )costos?|costes?|(la |de )inversion|tarifas?|colegiaturas?|valor(es)?|cuestan?
precio        how much( (is|are|does|do)( it| they)?( cost)?)?|prices?|costs?|quanto( (custa\w*|e|sai|fica|vale))?
precio        (q|k|ke|que) (pre[csz]io|vale)|cuanto
fechas        (para |desde )?cuando
              ( (\w+ )?(termin\w+|acaban?|emp[ie]+[zs]\w+|inici\w+|arranc\w+|comien\w+|abren?|hay|es|son|sale|toca))?
fechas        fechas?( de inicio)?|(empiez|comienz|arranc)an?|inicia[ns]?|inicio|proxim[oa]s? (grupos?|inicios?)
fechas        (start(ing)? )?dates?|when( (does|do|is) (it|they)( start)?)?|starts?|quando( (comeca\w*|e))?|datas
fechas        (empiec|comienc|arranqu)\w+|inicien
fechas        que dia (empiez|inici|comienz|arranc)\w+|calendario|comeca[mr]?
requisitos    requisit\w*|requer\w+|pre ?requisit\w*|requirements?|conocimientos?( previos?)?|saber algo
requisitos    (examen|prueba)( de (ubicacion|admision|colocacion|nivel))?
requisitos    (que|algo) (necesito|ocupo|se necesita|se ocupa|piden|hace falta|debo)( (saber|tener|llevar|para))*
requisitos    (incluye\w* |dan |piden )?(el |los )?material(es)?|que (llevo|hay que llevar)
requisitos    (necesito|hay que|tengo que|debo) (saber|tener|llevar)( (algo|antes|previamente))*|what do i need
requisitos    (necesito |piden |hace falta |tengo |tener |sin )*(mucha |alguna )?experiencia( previa)?(?! de usuario)
modalidad     modalidad(es)?|en ?linea|on ?line|(?<!asistente )(?<!realidad )virtual(es)?|presencial(es)?
modalidad     en persona|hibrid[oa]s?|a distancia|por zoom|en vivo|por internet|in person|desde (mi )?casa|grabad[oa]s
docente       (el |la |que |quien es el |quien es la |los |su |the )?
              (profes?|profesor\w*|docentes?|instructor\w*|teachers?|ponentes?|facilitador\w*)
docente       quien (lo |la |los )?(da|imparte|ensena|dicta|dara)|quien es (el |la )?(maestr[oa]|tutora?)
temario       (el |que |los |cuales son los )?temas?( (se )?(ven?|vemos|incluye|abarca|son))?
temario       temari\w*|(?<!de )contenidos?|programa|modulos?|syllabus
temario       que (\w+ )?(\w+ )?(ve|ven|vemos|aprend\w+|ensena|incluye\w*|abarca|trae|cubre)|plan de estudios?
temario       what (will i|do you|do i|does it) (learn|teach|cover)|o que (se )?aprend\w+
certificado   valor curricular|rvoe|stps
certificado   certifica(do|dos|n|te)|certificates?|diploma|constancias?|reconocimiento|avalad[oa]|validez
factura       factura(s|n|r|me)?|cfdi|invoices?|nota fiscal
direccion     (donde|onde) (es|son|estan?|quedan?|se (ubican?|encuentran?|dan?)|fica|estao)( \w*ubicad[oa]s)?
direccion     (la |su )?(direccion|ubicacion)(?! de)|sucursal\w*|sedes?|domicilio|de donde son|(en )?donde$
direccion     en que (ciudad|parte|lugar)( estan| es)?|where( (are you|is it))?( located)?|address
descuento     descuentos?|promo(s|cion|ciones)?|beca(s|dos?|rme)?|rebajas?|cupon(es)?|discounts?|descontos?|2x1
descuento     (esta |es |sale |muy )+car[oa]|ofertas?
inscripcion   (como |donde |quiero |quisiera |puedo |para |me )*(in?s?cr[ei][bvp]\w*|inscricao)( (me|al|a|en|yo))*
inscripcion   (me )?(matricul|registr)\w+|(apunt|anot|apart|separ|reserv)(o|ar|arme|arlo)
inscripcion   (how (do|can) i )?(to )?(enroll?|sign( me)? up|join)( in| for)?|enroll?ment|(lo )?comprar?(lo)?
inscripcion   (hay |quedan |tienen )?(cupos?|lugar(es)?|vagas|vacantes)|lo (tomo|quiero|compro)
inscripcion   como (le )?(hago|hacemos) para (entrar|tomarlo)|como (entro|ingreso|empiezo|participo)
inscripcion   quiero (entrar|tomarlo|ingresar)
no            no (me |nos )?(interesa\w*|gusta\w*|convence\w*|late|llama)
              ( (nada|ningun[oa]?|de|eso|esos|esas|la atencion))*
interes       (me )?(interesa\w*|gusta\w*|late|convence|encanta)|im interested|quiero (ese|este|esa|esta)|gostei
mas           (ver )?mas|mais
otro          (el|la) otr[oa]|the other( one)?|o outro
compara       (cual es |que |hay )?(la |alguna )?diferencias?( (hay|tienen))?( entre)?|difference( between)?|comparar
ambos         amb[oa]s|(l[oa]s|de l[oa]s) dos|los 2|both|os dois
acuerdo       esta bien|muy bien|que bien
senala        (de |del |a |por |para )?
              (es[eao]s?|est[eo]|estos|esta$|aquel|aquell[ao]|el mismo|dicho|that( one)?|this( one)?|esse|essa|isso)
              ( mismo| curso)?
senala        (el|del|este|ese) curso

edad          (para |de )?(ninos?|ninas?|menores( de edad)?|adolescentes)|infantil(es)?|edad( minima)?|kids|criancas
edad          (hij|nin|sobrin|niet|filh)[oa]s? (de |que tiene |tiene |tem )?\d{1,2} an(it)?os
medida        (las )?(\d{1,3}|un|una|dos|tres|cuatro|cinco) (de )?
              (enero|febrero|marzo|abril|mayo|junio|julio|agosto|se[pt]+iembre|octubre|noviembre|diciembre|am|pm|anos?
              |horas?|hrs?|dias?|semanas?|mes|meses|personas?|pesos|dolares|hij[oa]s?|cursos|minutos?|years?|dollars)
privado       (mi|my|meu) (numero de )?(correo|e?mail|tel(efono)?|cel(ular)?|numero|whats?app)( electronico)?( es| is)?
medida        (primera|segunda|tercera|ultima) (vez|parte)|las \d{1,2}

ayuda         (me )?(ayud\w*|ajuda\w*)|help( me)?|menu|opciones|que (puedes|sabes) hacer|instrucciones
ayuda         como funciona( esto)?|no (te |le |les )?(entiendo|entendi)|nao entendi|i dont understand
saludo        (ey |hey )?(h?ol+[ai]+s*|holi+s*|hey+|hi+|hello+|oi+|opa|alo|wenas|weenas|que onda|que hubo|que tal)
saludo        buen[oa]?s? (dias?|tardes?|noches?)|buenas|bom dia|boa (tarde|noite)|good (morning|afternoon|evening)
saludo        saludos|q tal
risa          (ja|je|ji|ha|he|hua){2,}\w?|lol|xd+|k{3,}|rs(rs)+
si            si+p?|sim|yes|yeah|yep|sure|claro que si|por supuesto|obvio|si claro
no            no+|nop|nope|nah|nao|ningun[oa]?|asi esta bien|nada( mas)?
acuerdo       (?<!\w )(va|sale|ya)(?! \w)|ok(ay|is|i|ey|a)?|vale|dale|listo|perfect[oa]?|excelente|genial|super
acuerdo       de acuerdo|bueno|entiendo
acuerdo       entendido|ya veo|claro|chevere|bacan[oa]?|barbaro|great|got it|beleza|orale|ah+|oh+|m{2,}
"""

# What a turn without a word says by its signs.
SIGNOS: tuple[tuple[str, str], ...] = (
    ("saludo", "👋🤝"),
    ("gracias", "🙏💐🌹"),
    ("acuerdo", "👍👌✅💪👏🆗💯"),
    ("risa", "😂🤣😆😅"),
    ("ayuda", "?¿❓❔"),
    ("si", "✔☑"),
    ("no", "👎❌"),
)

# Words that carry no subject, besides those that the search leaves aside.
VACIAS = _cursos_pregunta.VACIAS | frozenset(
    """aceptan ahora ahorita alguien am an antes as at aun aunque be bien buen buscaba can capacitar carrera
    casi com cosa cosas could darme deme di dices digo dije dijo does dos edad estaba estar eu faco fazer
    fijese gente hace haces has he hice hoy id im in it llevar looking luego menos mais mejor meu minha mira
    miren momento mucha muchas mucho muchos na nadie nas need nunca on one or pasas pase perdona pf
    podrias porfis pra preciso pronto quais qual quede quedo querer quieres reciben recien regalan s sea
    siempre so some t tan tanto tell tendria tenho ter ti todo todos total trabajo usted ustedes vamos vcs
    vdd verdad vez vou where which with your""".split()
)
# Subjects in English and Portuguese, for a catalogue in Spanish.
EN_ESPAÑOL: Mapping[str, str] = dict(
    accounting="contabilidad", baking="repostería", barber="barbería", beauty="belleza", bread="panadería",
    cake="pasteles", cakes="pasteles", chocolate="chocolatería", coffee="barismo", computer="computación",
    computers="computación", cooking="cocina", cook="cocina", design="diseño", drawing="dibujo",
    electrician="electricidad", english="inglés", eyelash="pestañas", finance="finanzas", french="francés",
    languages="idiomas", language="idiomas", leadership="liderazgo", makeup="maquillaje", nail="uñas",
    nails="uñas", payroll="nóminas", phone="celulares", phones="celulares", photo="fotografía",
    photography="fotografía", portuguese="portugués", programming="programación", project="proyectos",
    projects="proyectos", sales="ventas", sewing="costura", tax="impuestos", taxes="impuestos", website="web",
    confeitaria="repostería", culinaria="cocina", desenho="dibujo", maquiagem="maquillaje",
    panificacao="panadería", programacao="programación", unhas="uñas", vendas="ventas",
)  # fmt: skip
# How a subject is asked for: the words before it. "Curso de…", "aprender a…", "el de…", "¿y de…?" ask for a course;
# "tienen…" asks for anything that a school may have; "están en…" asks for a place.
_PEDIDO = re.compile(
    r"(\b(cursos?|clases?|taller(es)?|diplomados?|capacitaci\w+|courses?|class(es)?|lessons?|aulas?)"
    r"(( \w+){0,3} (del?|d|sobre|para|pa|on|about|of|for))?( (los|las|la|el|the|una?|hacer|usar))*"
    r"|\b(aprend\w+|estudi\w+|ensen[ae]\w*|learn\w*|study|estudar)"
    r"( (a|de|del|sobre|como|algo|mas|hacer|usar|la|el|los|las|una?|to|about|how))*"
    r"|\b(busco|buscando|buscamos|interesa\w*)( (algo|de|del|sobre|el|la|los|las|una?|curso|aprender))*"
    r"|\b(algo|something) (de|sobre|about|on)|\b(el|la|los|las|lo|o|a) (curso )?(del?|do|da|sobre)"
    r"|\bthe (one|\w+ one) (about|on|of)|(^|\b[ye] )(de|sobre)) $"
)
_OFRECIDA = re.compile(
    r"(\b(info\w*|informes?|detalles?|datos|precios?|costos?|cuestan?|vale|valen|sale|salen) (del?|d|sobre|en)"
    r"|\b(tienen?|tienes|tenes|teneis|dan|das|hay|ofrecen?|manejan|imparten|dictan|have|offer|teach|tem|oferecem))"
    r"( (el|la|los|las|una?|alguna?|any))? $"
)
_LUGAR = re.compile(
    r"\b((estan?|estamos|ubicad[oa]s|quedan?|sedes?|sucursal(es)?|cursos?|clases?|presencial(es)?|hay|algo|vivo|viven"
    r"|estudiar|tomar\w*|atienden|located|courses|classes) (en|in|em)|(son|vienen|soy|somos) de) $"
)
MESES: Mapping[str, int] = {
    mes: n
    for meses in (
        "enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre diciembre",
        "january february march april - june july august september october november december",
        "janeiro fevereiro marco - maio junho julho - setembro outubro novembro dezembro",
        "ene feb mar abr - jun jul ago setiembre oct nov dic",
    )
    for n, mes in enumerate(meses.split(), 1)
    if len(mes) > 3
}
# The most that one would pay: "que no pase de $1,000", "menos de mil pesos".
_TOPE = re.compile(
    r"(?:\bque )?(?:\bno (?:pasen?|rebasen?|excedan?|superen?|cuesten?|valgan?|salgan?)(?: m[aá]s)?|\bno m[aá]s|\bhasta"
    r"|(?:\b(?:cuest\w+|valgan?|salgan?|por|de) )?\bmenos|\bm[aá]ximo|\b(?:por )?(?:de|a)bajo|\bpresupuesto(?: es)?"
    r"|\bunder|\bless than|\bup to|\bat[eé])(?: de)?(?: los)? (?P<signo>\$ ?)?"
    r"(?P<n>\d[\d.,]*+(?: mil\b)?|(?:(?:dos|tres|cuatro|cinco) )?mil\b)"
    r"(?P<moneda> ?(?:pesos?|mxn|usd|d[oó]lares|varos|soles|euros|dollars|reais))?"
    r"(?! ?(?:horas?|hrs|a[nñ]os?|alumn|person|semanas?|mes|d[ií]as?|cursos|min|am\b|pm\b|de la|:|%))",
    re.IGNORECASE,
)
NIVELES: Mapping[str, re.Pattern[str]] = {
    "basico": re.compile(
        r"(b[ae][sc]i[ck]+[oa]s?|basic|prin[cs]ipiantes?|cero|inicial(es)?|beginners?|iniciantes?|introductori[oa]|novat[oa]s?)"
    ),
    "intermedio": re.compile(r"(inter?me[dr]i?[oa]s?|intermediate|intermediario)"),
    "avanzado": re.compile(r"(a[bv]an[sczx]+ad[oa]s?|advanced|expert[oa]s?|avancad[oa])"),
}
# Positions of a list; "the one about excel" and "um curso" are none.
_ORDINALES = "primer segund tercer cuart quint sext septim octav noven decim"
NUMEROS: Mapping[str, int] = {
    **{palabra: n for n, palabra in enumerate("uno dos tres cuatro cinco seis siete ocho nueve diez".split(), 1)},
    **{raiz + fin: n for n, raiz in enumerate(_ORDINALES.split(), 1) for fin in ("o", "a", "")},
    **{f"{n}{fin}": n for n in range(1, 10) for fin in ("ro", "ra", "er", "do", "da", "to", "ta", "st", "nd", "rd")},
    **dict(first=1, second=2, third=3, fourth=4, fifth=5, two=2, three=3, four=4, five=5),
    **dict(primeiro=1, primeira=1, segunda=2, terceiro=3, terceira=3, quarto=4, dois=2, quatro=4),
    **dict(ultimo=-1, ultima=-1, last=-1),
    **{str(n): n for n in range(1, 100)},
}
_POSICION = re.compile(
    rf"(?<!\S)(?:(?:el|la|lo|al|del|opcion|numero|num|nro|n|no|curso|the|o|do|option|number|y|and|e) )+"
    rf"(?P<n>{'|'.join(sorted(NUMEROS, key=len, reverse=True))})(?!\S)"
)

# --- Reading --------------------------------------------------------------------------------------------------

SANGRIA = 14  # columns before the expression of a row


def _expresiones(tabla: str) -> list[tuple[str, re.Pattern[str]]]:
    """The rows of a table such as PATRONES, each as its name and a pattern over whole words."""
    filas: list[tuple[str, str]] = []
    for linea in filter(str.strip, tabla.split("\n")):
        nombre, expresion = linea[:SANGRIA].strip(), linea[SANGRIA:]
        if not nombre:
            nombre, anterior = filas.pop()
            expresion = anterior + expresion
        filas.append((nombre, expresion))
    return [(nombre, re.compile(rf"(?<!\S)(?:{expresion})(?!\S)")) for nombre, expresion in filas]


_EXPRESIONES = _expresiones(PATRONES)
_PALABRA = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_PRIVADO = re.compile(r"\b[\w.+-]{1,64}@[\w-]+\.\S+|https?://\S+|www\.\S+|\+?\d[\d ().-]{7,}\d")
_CODIGO = re.compile(r"(?<![^\W_])[^\W\d_]{2,6}(?:[-_ ]?\d{3,4}|[-_]?\d{1,2})(?![^\W_])")
_ENMIENDA = re.compile(
    r"(?:^|[\n,.;!])[ \t]*(?:no,|perd[oó]n\b|digo\b|mejor dicho\b|quise decir\b|me equivoqu[eé]\b|corrijo\b)"
    r"|\bno (?:quiero|me interesa)\b[^\n.;!?]*?\b(?:mejor|sino|prefiero|quiero)\b(?= )", re.I
)


@dataclass(frozen=True)
class Lectura:
    """What a turn says. `tema` is what to search for, as it was written; `numeros` are positions in a list, -1 the
    last one; `meses` are months and `tope` the most to pay. `explicita` tells that the subject is asked for as that of
    a course ("curso de…", "aprender…"), `ofrecida` that it may be one ("tienen…", or nothing else was said), `lugar`
    that it stands where a place would ("están en…")."""

    dice: frozenset[str] = frozenset()
    tema: tuple[str, ...] = ()
    numeros: tuple[int, ...] = ()
    codigos: tuple[str, ...] = ()
    niveles: tuple[str, ...] = ()
    meses: tuple[int, ...] = ()
    tope: Decimal | None = None
    explicita: bool = False
    ofrecida: bool = False
    lugar: bool = False

    @property
    def asunto(self) -> tuple[str, ...]:
        """The subject without the words for a level."""
        return tuple(palabra for palabra in self.tema if nivel_de(palabra) is None)


def leer(texto: str) -> Lectura:
    """What a turn's text says; an empty Lectura for one that says nothing."""
    texto = _enmendado(_visible(texto))
    publico, privados = _PRIVADO.subn(" ", texto)
    publico, tope = _sin_tope(publico)
    codigos = tuple(dict.fromkeys(_CODIGO.findall(publico)))[:3]
    palabras = [(palabra, llana(palabra)) for palabra in _PALABRA.findall(publico)[:PALABRAS]]
    palabras = [(palabra, limpia) for palabra, limpia in palabras if limpia]
    dicha = " ".join(limpia for _, limpia in palabras)
    frase, dice = _tachar(dicha)
    numeros = tuple(NUMEROS[posicion["n"]] for posicion in _POSICION.finditer(frase))
    restos = _POSICION.sub(_tachadas, frase).split()
    quedan = [par for par, resto in zip(palabras, restos, strict=True) if resto != TACHADA and _dice_algo(par[1])]
    meses = tuple(dict.fromkeys(MESES[limpia] for _, limpia in quedan if limpia in MESES))
    quedan = [par for par in quedan if par[1] not in MESES]
    if all(limpia in NUMEROS for _, limpia in quedan):
        numeros, quedan = (*(NUMEROS[limpia] for _, limpia in quedan), *numeros), []
    quedan = [par for par in quedan if par[1] not in NUMEROS or par[1].isdigit()]
    return Lectura(
        dice=frozenset([*dice, *_de_mas(dice, privados, meses), *([] if palabras else _signos(texto))]),
        tema=tuple(palabra for palabra, _ in quedan),
        numeros=numeros[:LISTA],
        codigos=codigos,
        niveles=_niveles(quedan, dice),
        meses=meses,
        tope=Decimal(0) if "gratis" in dice else tope,
        **_como_se_pide(dicha, [limpia for palabra, limpia in quedan if nivel_de(palabra) is None]),
    )


def _de_mas(dice: Sequence[str], privados: int, meses: Sequence[int]) -> list[str]:
    """What else is said with something: a month asks for dates, "gratis" for the price."""
    return ["privado"] * bool(privados) + ["fechas"] * bool(meses) + ["precio"] * ("gratis" in dice)


def _niveles(quedan: Sequence[tuple[str, str]], dice: Sequence[str]) -> tuple[str, ...]:
    """The levels that are asked for; who knows the basics and says no more wants what comes next."""
    dichos = tuple(dict.fromkeys(nivel for palabra, _ in quedan if (nivel := nivel_de(palabra))))
    return dichos or (("intermedio",) if "ya_sabe" in dice else ())


def _sin_tope(texto: str) -> tuple[str, Decimal | None]:
    """A text without the most that one would pay, and how much that is; None where it is not said."""
    dicho = _TOPE.search(texto)
    if dicho is None:
        return texto, None
    *cifra, ultima = re.sub(r"[.,](?=\d{3}\b)", "", dicho["n"].lower()).replace(",", ".").strip(".").split()
    miles = 1000 if ultima == "mil" else 1
    numero = (cifra or ["1"])[0] if miles > 1 else ultima
    try:
        tope = Decimal(NUMEROS.get(numero, 0) or numero) * miles
    except InvalidOperation:  # two points: a date, or a slip
        return texto, None
    if tope < 100 and not (dicho["signo"] or dicho["moneda"]):
        return texto, None
    return texto.replace(dicho[0], " ", 1), tope


def llana(palabra: str) -> str:
    """A word in lower case, without accents and with no letter three times in a row: "Holaaa" is "hola"."""
    letras = "".join(letra for letra in unicodedata.normalize("NFKD", palabra[:40].lower()) if letra.isalnum())
    return re.sub(r"([^\W\dk_])\1{2,}", r"\1", letras)


def nivel_de(palabra: str) -> str | None:
    """The level that a word names (basico, intermedio, avanzado); None for any other word."""
    return next((nivel for nivel, expresion in NIVELES.items() if expresion.fullmatch(llana(palabra))), None)


def _visible(texto: str) -> str:
    """A text without control and direction characters."""
    return "".join(letra if letra == "\n" or unicodedata.category(letra)[0] != "C" else " " for letra in texto)


def _enmendado(texto: str) -> str:
    """What counts of a text that corrects itself: "el 2, perdón, el 3" is "el 3"."""
    *_, ultimo = _ENMIENDA.split(texto)
    return ultimo if _PALABRA.search(ultimo) else texto


def _tachar(frase: str) -> tuple[str, list[str]]:
    """The phrase with the words that rows of PATRONES took struck out, and the names of those rows."""
    dice = []
    for nombre, expresion in _EXPRESIONES:
        frase, veces = expresion.subn(_tachadas, frase)
        if veces:
            dice.append(nombre)
    return frase, dice


def _tachadas(hallazgo: re.Match[str]) -> str:
    """What was found with a mark in place of each word."""
    return re.sub(r"\S+", TACHADA, hallazgo[0])


def _dice_algo(limpia: str) -> bool:
    """Whether a word may be searched for."""
    return limpia in NUMEROS or (limpia not in VACIAS and len(limpia) > 1)


def _como_se_pide(frase: str, asunto: Sequence[str]) -> dict[str, bool]:
    """How a phrase asks for its subject: the fields of Lectura that tell it."""
    if not asunto:
        return {}
    antes, _, despues = f" {frase} ".partition(f" {asunto[0]} ")
    antes = antes.lstrip() + " " if antes.strip() else ""
    pocas = len(asunto) <= 2
    return {
        "explicita": bool(_PEDIDO.search(antes) or re.match(r"(courses?|class(es)?|lessons?)\b", despues)),
        "ofrecida": pocas and (bool(_OFRECIDA.search(antes)) or set(frase.split()) <= {*asunto, *_ARTICULOS}),
        "lugar": pocas and bool(_LUGAR.search(antes)),
    }


_ARTICULOS = ("el", "la", "los", "las", "de", "y")


def _signos(texto: str) -> list[str]:
    """What a turn without a word says by an emoji or a question mark."""
    return [nombre for nombre, signos in SIGNOS if any(signo in texto for signo in signos)][:1]
