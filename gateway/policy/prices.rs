//! From the prices as they are written to the book that requests are priced by.

use infergate_plugins::provider;
use sha2::Digest;

use super::problem::{Document, nearest};
use super::{Compiler, File, Problems, file};
use crate::money::book::{Book, Wrong};
use crate::money::file::{Price, PriceFile, Prices};

impl Compiler<'_> {
    /// The book, if the policy has prices.
    pub(super) fn prices(&mut self, file: &File) -> Option<Book> {
        let prices = file.prices.as_ref()?;
        let (document, listed) = self.price_file(prices)?;
        let mut told: Vec<Wrong> = self.places(&prices.list, file);
        let mut told_of_file = self.places(&listed, file);
        let book = Book::of(&[&prices.list, &listed]).map_err(|wrongs| {
            let mut wrongs = wrongs.into_iter();
            told.extend(wrongs.next().unwrap_or_default());
            told_of_file.extend(wrongs.next().unwrap_or_default());
        });
        for (key, message) in told {
            self.wrong(&format!("prices.list{key}"), message);
        }
        for (key, message) in told_of_file {
            self.wrong_in_file(prices, &document.problem(&format!("list{key}"), message).to_string());
        }
        book.ok()
    }

    /// The file of prices: where its lines are, and its list.
    fn price_file(&mut self, prices: &Prices) -> Option<(Document, Vec<Price>)> {
        let Some(path) = &prices.file else { return Some((Document::default(), Vec::new())) };
        let path = self.beside(path);
        self.secret_files.push(path.clone());
        let text = std::fs::read_to_string(&path)
            .map_err(|error| self.wrong("prices.file", format!("{} cannot be read: {error}", path.display())))
            .ok()?;
        self.secrets.update(&text);
        match read(&text) {
            Ok((document, file)) => Some((document, file.list)),
            Err(problems) => {
                problems.0.iter().for_each(|problem| self.wrong_in_file(prices, &problem.to_string()));
                None
            }
        }
    }

    fn wrong_in_file(&mut self, prices: &Prices, problem: &str) {
        let name = prices.file.as_ref().map(|path| path.display().to_string()).unwrap_or_default();
        self.wrong("prices.file", format!("{name}:{problem}"));
    }

    /// Prices for places that are not there.
    fn places(&self, list: &[Price], file: &File) -> Vec<Wrong> {
        let kinds = || provider::KINDS.iter().map(|(kind, _)| *kind);
        let mut wrongs = Vec::new();
        for (index, price) in list.iter().enumerate() {
            if let Some(kind) = price.provider.as_deref().filter(|kind| kinds().all(|known| known != *kind)) {
                let known = kinds().collect::<Vec<_>>().join(", ");
                wrongs.push((
                    format!("[{index}].provider"),
                    format!("{kind} is none of {known}{}", nearest(kind, kinds())),
                ));
            }
            if let Some(pool) = price.pool.as_deref().filter(|pool| !file.pools.contains_key(*pool)) {
                let hint = nearest(pool, file.pools.keys().map(String::as_str));
                wrongs.push((format!("[{index}].pool"), format!("no pool is named {pool}{hint}")));
            }
        }
        wrongs
    }
}

/// Whether streams are asked for the usage that their clients did not ask for.
pub(super) fn asks_for_usage(file: &File) -> bool {
    match file.metering {
        Some(metering) => metering.usage == file::MeterUsage::Ask,
        None => file.prices.is_some() || listens(file),
    }
}

/// Whether some engine tells of its KV cache: a prompt's length in tokens tells which of the blocks are whose.
fn listens(file: &File) -> bool {
    file.pools.values().flat_map(|pool| &pool.upstreams).any(|upstream| upstream.kv_events.is_some())
}

/// The schema of a file of prices.
pub fn schema() -> schemars::Schema {
    schemars::schema_for!(PriceFile)
}

/// Reads a file of prices: its document and its list, or all in which it is not what its schema says.
pub fn read(text: &str) -> Result<(Document, PriceFile), Problems> {
    let document = Document::parse(text).map_err(|problem| Problems(vec![problem]))?;
    let file = document.read().map_err(Problems::in_order)?;
    Ok((document, file))
}

/// A file of prices on its own: the book, or all that is wrong with it.
pub fn book(text: &str) -> Result<Book, Problems> {
    let (document, file) = read(text)?;
    Book::of(&[&file.list]).map_err(|wrongs| {
        let wrongs = wrongs.into_iter().flatten();
        Problems::in_order(wrongs.map(|(key, told)| document.problem(&format!("list{key}"), told)).collect())
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::{POOLS, compiled, problems};
    use super::*;

    #[test]
    fn every_wrong_price_is_told_at_its_line() {
        let told = problems(&format!(
            "{POOLS}prices:\n  list:\n    - {{models: [a], input: 2, provider: opnai}}\n    - models: [b]\n      input: 1\n      pool: fats\n    - models: [c]\n    - {{models: [d], input: cheap}}\n    - {{models: [d], input: -1}}\n"
        ));
        assert_eq!(told.len(), 2, "{told:#?}");
        assert!(
            told[0].contains(":12:") && told[0].contains("prices.list[3].input: cheap must be a number"),
            "{told:#?}"
        );
        assert!(told[1].contains(":13:") && told[1].contains("prices.list[4].input"), "{told:#?}");
        let told = problems(&format!(
            "{POOLS}prices:\n  list:\n    - {{models: [a], input: 2, provider: opnai}}\n    - models: [b]\n      input: 1\n      pool: fats\n    - models: [c]\n"
        ));
        assert!(told[0].contains("list[0].provider: opnai is none of") && told[0].contains("did you mean openai?"));
        assert!(told[1].contains(":10:") && told[1].contains("no pool is named fats; did you mean fast?"), "{told:#?}");
        assert!(told[2].contains("prices.list[2]: no price is in it"), "{told:#?}");
    }

    #[test]
    fn usage_is_asked_for_where_somebody_pays_or_the_policy_says_so() {
        let asks = |more: &str| compiled(&format!("{POOLS}{more}")).unwrap().asks_for_usage;
        assert!(!asks(""));
        assert!(asks("prices: {list: [{models: [m], input: 1}]}\n"));
        assert!(asks("metering: {}\n"));
        assert!(asks("metering: {usage: ask}\n"));
        assert!(!asks("prices: {}\nmetering: {usage: as_is}\n"));
        let listens = "version: 1\npools: {p: {balance: prefix, upstreams: [{url: 'http://h:1', kv_events: 5557}]}}\nmodels: [{name: m, pool: p}]\n";
        assert!(compiled(listens).unwrap().asks_for_usage);
        let told = problems(&listens.replace("kv_events: 5557", "kv_session: body"));
        assert!(told[0].contains("upstreams[0].kv_session: no engine is listened to"), "{told:?}");
    }

    #[test]
    fn a_missing_file_of_prices_is_told() {
        let told = problems(&format!("{POOLS}prices: {{file: /does/not/exist.yaml}}\n"));
        assert!(told[0].contains("prices.file: /does/not/exist.yaml cannot be read"), "{told:#?}");
    }

    #[test]
    fn a_file_of_prices_is_read_alone_with_its_lines() {
        let told = book("version: 1\nlist:\n  - models: [a]\n    inptu: 1\n").unwrap_err().lines("prices.yaml");
        assert!(told[0].starts_with("prices.yaml:4:5: list[0].inptu: unknown key; did you mean input?"), "{told:#?}");
        let told = book("version: 1\nlist:\n  - models: [a]\n    input: 1\n    from: soon\n").unwrap_err().lines("p");
        assert!(told[0].starts_with("p:5:5: list[0].from: must be a day"), "{told:#?}");
        assert_eq!(book("version: 1\nlist:\n  - {models: [a, 'b*'], input: 1}\n").unwrap().len(), 2);
    }
}
