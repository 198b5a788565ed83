//! Which language a text is in: by its script, or for Latin letters by the words that no sentence does without.

use std::collections::HashMap;
use std::sync::LazyLock;

/// The languages that can be guessed, by their ISO 639-1 codes.
pub(super) const KNOWN: [&str; 23] = [
    "en", "de", "fr", "es", "it", "pt", "nl", "pl", "sv", "tr", "ru", "uk", "el", "ar", "fa", "he", "hi", "th", "zh",
    "ja", "ko", "ta", "bn",
];

/// How many of them are written in Latin letters; they come first.
const LATIN: usize = 10;

/// Enough to tell.
const MOST_WORDS: usize = 200;
const MOST_LETTERS: usize = 1000;

/// The language of texts that belong together, if one is clearly ahead.
pub(super) fn guess<'a>(texts: impl Iterator<Item = &'a str> + Clone) -> Option<&'static str> {
    let mut scripts = [0_u32; KNOWN.len()];
    let (mut latin, mut seen) = (0_u32, 0);
    for letter in texts.clone().flat_map(str::chars).take(MOST_LETTERS).filter(|c| c.is_alphabetic()) {
        seen += 1;
        if u32::from(letter) < 0x250 {
            latin += 1;
        } else if let Some(language) = script(letter) {
            scripts[language] += 1;
        }
    }
    if seen == 0 {
        return None;
    }
    if latin * 2 > seen { by_words(texts) } else { by_script(&mut scripts, seen) }
}

/// The language that a letter speaks for; those of one script are settled in [`by_script`].
fn script(letter: char) -> Option<usize> {
    let code = match u32::from(letter) {
        0x0370..=0x03FF | 0x1F00..=0x1FFF => "el",
        0x0404 | 0x0406 | 0x0407 | 0x0454 | 0x0456 | 0x0457 | 0x0490 | 0x0491 => "uk",
        0x0400..=0x04FF => "ru",
        0x0590..=0x05FF => "he",
        0x067E | 0x0686 | 0x0698 | 0x06A9 | 0x06AF | 0x06CC => "fa",
        0x0600..=0x06FF => "ar",
        0x0900..=0x097F => "hi",
        0x0980..=0x09FF => "bn",
        0x0B80..=0x0BFF => "ta",
        0x0E00..=0x0E7F => "th",
        0x3040..=0x30FF => "ja",
        0x1100..=0x11FF | 0xAC00..=0xD7AF => "ko",
        0x3400..=0x9FFF | 0x20000..=0x2FA1F => "zh",
        _ => return None,
    };
    index(code)
}

fn index(code: &str) -> Option<usize> {
    KNOWN.iter().position(|known| *known == code)
}

/// Japanese is written with ideographs too, Ukrainian and Persian mostly with their neighbours' letters.
fn by_script(scripts: &mut [u32; KNOWN.len()], seen: u32) -> Option<&'static str> {
    for (own, neighbour, least) in [("ja", "zh", 20), ("uk", "ru", 3), ("fa", "ar", 5)] {
        let (own, neighbour) = (index(own)?, index(neighbour)?);
        if scripts[own] * 100 >= least * (scripts[own] + scripts[neighbour]).max(1) {
            scripts[own] += std::mem::take(&mut scripts[neighbour]);
        } else {
            scripts[neighbour] += std::mem::take(&mut scripts[own]);
        }
    }
    let (best, count) = scripts.iter().enumerate().max_by_key(|(_, count)| **count)?;
    (*count * 2 > seen).then(|| KNOWN[best])
}

fn by_words<'a>(texts: impl Iterator<Item = &'a str>) -> Option<&'static str> {
    let mut counts = [0_u32; LATIN];
    let words = texts.flat_map(|text| text.split(|c: char| !c.is_alphabetic() && c != '\'')).filter(|w| !w.is_empty());
    for word in words.take(MOST_WORDS) {
        let languages = lower(word).and_then(|(bytes, len)| COMMON.get(bytes.get(..len)?)).copied().unwrap_or(0);
        for (at, count) in counts.iter_mut().enumerate() {
            *count += u32::from(languages >> at & 1);
        }
    }
    let (best, most) = counts.iter().enumerate().max_by_key(|(at, count)| (**count, LATIN - at))?;
    let second = counts.iter().enumerate().filter(|(at, _)| *at != best).map(|(_, count)| *count).max()?;
    (*most >= 2 && *most > second).then(|| KNOWN[best])
}

/// A short word in lower case.
fn lower(word: &str) -> Option<([u8; 16], usize)> {
    let (mut bytes, mut len) = ([0; 16], 0);
    for letter in word.chars().flat_map(char::to_lowercase) {
        let slot = bytes.get_mut(len..len + letter.len_utf8())?;
        len += letter.encode_utf8(slot).len();
    }
    Some((bytes, len))
}

/// Which languages a word is common in, one bit each.
static COMMON: LazyLock<HashMap<&'static [u8], u16>> = LazyLock::new(|| {
    let mut common = HashMap::new();
    for (at, words) in WORDS.iter().enumerate() {
        words.split(' ').for_each(|word| *common.entry(word.as_bytes()).or_default() |= 1 << at);
    }
    common
});

/// In the order of [`KNOWN`].
const WORDS: [&str; LATIN] = [
    "the of and to in is you that it for on are with as i his they be at this have from or by not what all were when \
     we your can there an how which their if do will about my me please could would should does did has was where who \
     why write explain give make",
    "der die das und ist nicht ich sie es ein eine einen zu mit auf für von dem den des im wie was wir auch bei aus \
     nach werden wird oder haben hat kann kannst bitte mir mein warum über sind als dass du ihr schreibe",
    "le la les et est des un une du de dans que qui pour pas sur avec je vous nous il elle ce cette sont par plus mais \
     au aux comment pourquoi quel quelle est-ce ne se ou où être avoir mon ma mes peux écris s'il",
    "el la los las y es de que en un una por con no para su se del al lo como más pero sus le ya cómo qué cuál dónde \
     está son mi me puedes escribe sobre este esta hay muy también porque quiero",
    "il lo la gli le e è di che in un una per con non sono del della dei alla nel come più ma si mi ti ci questo \
     questa cosa perché quando dove anche puoi scrivi ho hai essere fare qual",
    "o a os as e é de que em um uma por com não para se do da dos das no na ao como mais mas foi ele ela você eu meu \
     minha isso este esta qual onde porque escreva pode são está muito também",
    "de het een en is van dat niet ik je in op te met voor zijn er aan ook als maar om hij ze wat hoe waarom wij naar \
     bij kan kun deze dit heeft hebben wordt schrijf mijn geen over uit",
    "i w na nie się jest to że z do o jak co czy ale po od za dla przez ten ta są być mnie mi proszę dlaczego gdzie \
     jaki jaka napisz może tego który która moje tak już",
    "och i att det som en på är av för med den till inte om jag har de ett du var kan vi från så hur vad varför när \
     skriv min mitt eller man ska mig detta över utan",
    "ve bir bu da de için ile ne mi mı çok var daha ben sen o gibi olarak en kadar nasıl neden nedir olan ama değil \
     bana benim yaz lütfen şey hangi her ya veya sonra",
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
            assert_eq!(guess([text].into_iter()), Some(language), "{text}");
        }
    }

    #[test]
    fn where_nothing_tells_nothing_is_guessed() {
        for text in ["", "12345 + 678", "xyzzy plugh", "{\"a\": 1}"] {
            assert_eq!(guess([text].into_iter()), None, "{text}");
        }
    }
}
