//! Which language a text is in: by its script, and where languages share one, by the words that no sentence does without.

use std::collections::{BTreeSet, HashMap};
use std::sync::LazyLock;

/// The language of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Told {
    /// Its ISO 639-1 code.
    pub code: &'static str,
    /// Whether there is enough of it to act on. Otherwise it is the best guess.
    pub is_sure: bool,
}

/// So much is looked at.
const LETTERS_MAX: usize = 2_400;
const WORDS_MAX: usize = 400;
/// Fewer letters than this are never sure.
const LETTERS_SURE: usize = 40;
/// The share of letters of one script, in percent: to guess, and to be sure.
const SHARE_GUESSED: usize = 51;
const SHARE_SURE: usize = 70;
/// The least share of Japanese syllables among Japanese letters, in percent; the others may be Chinese.
const SYLLABLES: usize = 15;

/// Every code that can be told.
pub fn known() -> BTreeSet<&'static str> {
    let of_words = WORDS.iter().map(|(code, _)| *code);
    SCRIPTS.iter().map(|(code, _)| *code).filter(|code| *code != LATIN).chain(of_words).collect()
}

/// The language of texts that belong together; None if nothing tells.
pub fn told<'t>(texts: impl Iterator<Item = &'t str> + Clone) -> Option<Told> {
    let (mut scripts, mut letters) = ([0_usize; SCRIPTS.len()], 0);
    for letter in texts.clone().flat_map(str::chars).filter(|c| c.is_alphabetic()).take(LETTERS_MAX) {
        letters += 1;
        if let Some(script) = script(letter) {
            scripts[script] += 1;
        }
    }
    let count = |wanted: &str| SCRIPTS.iter().zip(scripts).find(|((code, _), _)| *code == wanted).map_or(0, |(_, n)| n);
    let japanese = count("ja") * 100 >= letters * SYLLABLES && count("ja") > 0;
    let (most, (script, _)) = scripts.into_iter().zip(SCRIPTS).max_by_key(|(count, _)| *count)?;
    let (script, most) = match *script {
        "zh" | "ja" if japanese => ("ja", count("ja") + count("zh")),
        script => (script, most),
    };
    let share = (most * 100).checked_div(letters)?;
    let enough = letters >= LETTERS_SURE && share >= SHARE_SURE;
    match sharing(script) {
        _ if share < SHARE_GUESSED => None,
        [] => Some(Told { code: script, is_sure: enough }),
        codes => {
            let by_words = by_words(texts.clone(), codes);
            let told = by_words.map(|told| Told { is_sure: told.is_sure && enough, ..told });
            told.or_else(|| by_letters(texts, script, letters))
        }
    }
}

/// Scripts that are told by their letters; the code is that of the language which has it alone, or most often.
const SCRIPTS: &[(&str, &[(char, char)]); 12] = &[
    (LATIN, &[('A', '\u{24f}'), ('\u{1e00}', '\u{1eff}')]),
    ("el", &[('\u{370}', '\u{3ff}'), ('\u{1f00}', '\u{1fff}')]),
    ("ru", &[('\u{400}', '\u{4ff}')]),
    ("he", &[('\u{590}', '\u{5ff}')]),
    ("ar", &[('\u{600}', '\u{6ff}')]),
    ("hi", &[('\u{900}', '\u{97f}')]),
    ("bn", &[('\u{980}', '\u{9ff}')]),
    ("ta", &[('\u{b80}', '\u{bff}')]),
    ("th", &[('\u{e00}', '\u{e7f}')]),
    ("ko", &[('\u{1100}', '\u{11ff}'), ('\u{ac00}', '\u{d7af}')]),
    ("ja", &[('\u{3040}', '\u{30ff}')]),
    ("zh", &[('\u{3400}', '\u{9fff}'), ('\u{20000}', '\u{2fa1f}')]),
];

const LATIN: &str = "latin";

fn script(letter: char) -> Option<usize> {
    let within = |ranges: &[(char, char)]| ranges.iter().any(|(low, high)| (*low..=*high).contains(&letter));
    SCRIPTS.iter().position(|(_, ranges)| within(ranges))
}

/// The languages whose words are looked at where this script is.
fn sharing(script: &str) -> &'static [&'static str] {
    match script {
        LATIN => {
            &["en", "de", "fr", "es", "it", "pt", "nl", "sv", "da", "no", "fi", "pl", "cs", "hu", "ro", "tr", "vi"]
        }
        "ru" => &["ru", "uk", "bg"],
        "ar" => &["ar", "fa"],
        _ => &[],
    }
}

/// The language with the most frequent words in a text, if it leads.
fn by_words<'t>(texts: impl Iterator<Item = &'t str>, codes: &[&'static str]) -> Option<Told> {
    let (mut counts, mut count) = ([0_usize; WORDS.len()], 0);
    let words = texts.flat_map(|text| text.split(|c: char| !c.is_alphabetic())).filter(|word| !word.is_empty());
    for word in words.take(WORDS_MAX) {
        count += 1;
        let languages = lower(word).and_then(|(bytes, len)| COMMON.get(bytes.get(..len)?)).copied().unwrap_or(0);
        for (at, count) in counts.iter_mut().enumerate() {
            *count += (languages >> at & 1) as usize;
        }
    }
    let (mut best, mut second, mut code) = (0, 0, "");
    for (count, (language, _)) in counts.into_iter().zip(WORDS).filter(|(_, (code, _))| codes.contains(code)) {
        second = second.max(count.min(best));
        (best, code) = if count > best { (count, *language) } else { (best, code) };
    }
    let is_sure = best >= 3 && best * 100 >= count * 12;
    (best >= 2 && best > second).then_some(Told { code, is_sure })
}

/// Ukrainian and Persian have letters that their neighbours lack. Latin letters tell nothing.
fn by_letters<'t>(texts: impl Iterator<Item = &'t str>, script: &'static str, letters: usize) -> Option<Told> {
    let (own, code, least) = match script {
        "ru" => ("ЄІЇєіїҐґ", "uk", 3),
        "ar" => ("پچژکگی", "fa", 5),
        _ => return None,
    };
    let count = texts.flat_map(str::chars).take(LETTERS_MAX).filter(|c| own.contains(*c)).count();
    Some(Told { code: if count * 100 >= least * letters { code } else { script }, is_sure: false })
}

/// A short word in lower case.
fn lower(word: &str) -> Option<([u8; 24], usize)> {
    let (mut bytes, mut len) = ([0; 24], 0);
    for letter in word.chars().flat_map(char::to_lowercase) {
        let slot = bytes.get_mut(len..len + letter.len_utf8())?;
        len += letter.encode_utf8(slot).len();
    }
    Some((bytes, len))
}

/// Which languages a word is common in, one bit each.
static COMMON: LazyLock<HashMap<&'static [u8], u32>> = LazyLock::new(|| {
    let mut common = HashMap::new();
    for (at, (_, words)) in WORDS.iter().enumerate() {
        words.split(' ').for_each(|word| *common.entry(word.as_bytes()).or_default() |= 1 << at);
    }
    common
});

/// Frequent words of languages that share a script.
const WORDS: &[(&str, &str); 22] = &[
    (
        "en",
        "the and of to in is that for it with as on you this are be not was or have from by an but they which at \
         can will your we if there what all would their has more i his were when how do about my me please could \
         should does did where who why write explain give make",
    ),
    (
        "de",
        "der die und das ist nicht ein eine zu den mit von für auf im auch es sich ich des dem wir sie wie aus \
         bei als nach werden oder kann sind dass wird haben einer nur noch über einen was hat kannst bitte mir \
         mein warum du ihr schreibe",
    ),
    (
        "fr",
        "le la les et des est une un du que dans pour qui pas au sur avec ne ce il vous plus par sont cette mais \
         nous ou je se ont être aux son comme fait leur elle tout de comment pourquoi quel quelle où avoir mon \
         ma mes peux écris",
    ),
    (
        "es",
        "el la los de que y en un una es por con no para las se del al lo como más su pero sus le ya o este sí \
         porque esta son entre cuando muy sin sobre también hay puede cómo qué cuál dónde está mi me puedes \
         escribe quiero",
    ),
    (
        "it",
        "il di che la e un per non una in sono è del si con le da come della i gli più nel anche alla questo ma \
         ha lo dei dal delle quando se molto essere tutti suo ci può mi ti questa cosa perché dove puoi scrivi \
         ho hai fare qual",
    ),
    (
        "pt",
        "o de que e do da em um para com não uma os no se na por mais as dos como mas ao ele das seu sua ou \
         quando muito nos já eu também pelo pela até isso ela entre são você a é foi meu minha este esta qual \
         onde porque escreva pode está",
    ),
    (
        "nl",
        "de het een en van is dat niet in te op zijn voor met die er aan ook om als maar dan bij nog uit wel \
         naar door over ze hij worden kan heeft deze geen wat je werd zo ik hoe waarom wij kun dit hebben wordt \
         schrijf mijn",
    ),
    (
        "sv",
        "och att det i en som är på av för med till den har de inte om ett var jag men så kan från vi ska han \
         eller när hade sig också där nu detta alla bara du hur vad varför skriv min mitt man mig över utan",
    ),
    (
        "da",
        "og at det i en er som på af for med til den har de ikke om et var jeg men så kan fra vi skal han eller \
         når havde sig også der nu dette alle blev være",
    ),
    (
        "no",
        "og å det i en er som på av for med til den har de ikke om et var jeg men så kan fra vi skal han eller \
         når hadde seg også der nå dette alle ble være",
    ),
    (
        "fi",
        "ja on ei se että oli hän mutta ovat kun niin myös voi olla sen tai joka kuin mitä vain jos minä tämä \
         ole sitä hyvin siitä kanssa sekä mukaan jonka",
    ),
    (
        "pl",
        "i w nie na się z do to że jest o jak ale po co za od tak przez są dla być czy tym jego już przy można \
         oraz tylko był może ich lub które jako ten ta mnie mi proszę dlaczego gdzie jaki jaka napisz tego który \
         która moje",
    ),
    (
        "cs",
        "a se v na je že o s z do i to jako za ale pro by jsem být jsou které nebo který už tak také po podle \
         při jeho však od ke není jen mezi",
    ),
    (
        "hu",
        "a az és hogy nem is egy van ez meg de csak volt már mint vagy ha még el ki kell lehet minden azt mert \
         nagyon amely azonban pedig majd ezt",
    ),
    (
        "ro",
        "și de la a în nu cu o pe care este un din să mai se pentru ce sunt dar au al fi după ca sau prin fost \
         acest lui ale despre când foarte",
    ),
    (
        "tr",
        "ve bir bu da de için ile olarak çok daha en gibi olan ne var kadar sonra ama ya değil her mi ben şey \
         olduğu tarafından ise veya göre mı sen o nasıl neden nedir bana benim yaz lütfen hangi",
    ),
    (
        "vi",
        "và của là có không được cho trong một các với người này đã để những khi từ về như đến tôi ra cũng vào \
         bạn nhưng thì nhiều",
    ),
    (
        "ru",
        "и в не на я что с он а как это по но к из у за от то же для вы так все бы его мы или если она они есть \
         быть было уже только когда",
    ),
    (
        "uk",
        "і в не на що з та до це як у за від є але по він ми ви для або якщо так його про вони вона їх може бути \
         був було цього також через під",
    ),
    (
        "bg",
        "и на да се в не за от е с че по си са като това но до ще които този или при може само след към така още \
         беше бъде има тези",
    ),
    ("ar", "في من على أن إلى ما لا هذا عن مع هو هي كان التي الذي ذلك هذه لم قد كل بعد أو بين عند"),
    ("fa", "و در به از که این است را با برای آن یک خود تا می شود های بر هم نیز شده اما یا هر باید"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sentence_is_enough() {
        for (language, text) in [
            ("en", "Please explain how the heart works."),
            ("de", "Bitte erkläre mir, wie das Herz funktioniert und was es tut."),
            ("fr", "Peux-tu m'expliquer comment fonctionne le cœur et pourquoi il bat dans la poitrine ?"),
            ("es", "¿Puedes explicar cómo funciona el corazón y por qué late?"),
            ("it", "Mi spieghi come funziona il cuore e perché batte? Non ho capito questa cosa."),
            ("pt", "Você pode explicar como o coração funciona e por que ele bate? Não sei."),
            ("nl", "Kun je uitleggen hoe het hart werkt en waarom dat niet stopt?"),
            ("pl", "Proszę wyjaśnij mi, jak działa serce i dlaczego nie jest to mięsień, który się męczy."),
            ("sv", "Kan du förklara hur hjärtat fungerar och varför det inte blir trött?"),
            ("tr", "Kalbin nasıl çalıştığını bana açıklar mısın, neden bu kadar önemli ve ne için var?"),
            ("ru", "Объясни, пожалуйста, как работает сердце."),
            ("uk", "Поясни, будь ласка, як працює серце і чому воно не втомлюється."),
            ("el", "Εξήγησε πώς λειτουργεί η καρδιά."),
            ("ar", "اشرح كيف يعمل القلب"),
            ("fa", "لطفاً توضیح بده که قلب چگونه کار می‌کند"),
            ("he", "הסבר איך הלב עובד"),
            ("hi", "समझाइए कि दिल कैसे काम करता है"),
            ("th", "อธิบายว่าหัวใจทำงานอย่างไร"),
            ("zh", "请解释心脏是如何工作的"),
            ("ja", "心臓の仕組みを説明してください"),
            ("ko", "심장이 어떻게 작동하는지 설명해 주세요"),
        ] {
            assert_eq!(told([text].into_iter()).map(|told| told.code), Some(language), "{text}");
        }
    }

    #[test]
    fn where_nothing_tells_nothing_is_guessed() {
        for text in ["", "12345 + 678", "xyzzy plugh", "{\"a\": 1}"] {
            assert_eq!(told([text].into_iter()), None, "{text}");
        }
    }
}
