//! A value of the file, and the way to it.

use serde_json::Value;

/// A value that stands somewhere.
#[derive(Clone, Debug)]
pub(super) struct At<'a> {
    /// The way to it from the top: `model_list[0].litellm_params.model`.
    pub path: String,
    /// The value.
    pub value: &'a Value,
}

impl<'a> At<'a> {
    pub fn root(value: &'a Value) -> Self {
        Self { path: String::new(), value }
    }

    /// The member of this name, if it has a value.
    pub fn get(&self, key: &str) -> Option<Self> {
        let value = self.value.get(key).filter(|value| !value.is_null())?;
        Some(Self { path: self.to(key), value })
    }

    fn to(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    /// The members of a mapping.
    pub fn members(&self) -> Vec<(&'a str, Self)> {
        let members = self.value.as_object().into_iter().flatten();
        members.map(|(key, value)| (key.as_str(), Self { path: self.to(key), value })).collect()
    }

    /// The elements of a list.
    pub fn items(&self) -> Vec<Self> {
        let items = self.value.as_array().into_iter().flatten().enumerate();
        items.map(|(index, value)| Self { path: format!("{}[{index}]", self.path), value }).collect()
    }

    /// Members or elements.
    pub fn below(&self) -> Vec<Self> {
        let members = self.members().into_iter().map(|(_, at)| at);
        members.chain(self.items()).collect()
    }

    pub fn text(&self) -> Option<&'a str> {
        self.value.as_str()
    }

    /// A number that is not negative, also one in quotes, as Python would take it.
    pub fn number(&self) -> Option<f64> {
        let number = self.value.as_f64().or_else(|| self.text()?.trim().parse().ok());
        number.filter(|number: &f64| number.is_finite() && *number >= 0.0)
    }

    /// Seconds, in milliseconds: from one to a day.
    pub fn milliseconds(&self) -> Option<u64> {
        let milliseconds = self.number()? * 1000.0;
        (1.0..=86_400_000.0).contains(&milliseconds).then_some(milliseconds as u64)
    }

    /// A whole number, at most a quadrillion.
    pub fn count(&self) -> Option<u64> {
        self.number().filter(|number| *number <= 1e15).map(|number| number as u64)
    }

    /// Whether it says yes, in one of Python's or YAML's ways.
    pub fn is_true(&self) -> bool {
        let word = self.text().map(str::to_ascii_lowercase);
        self.value.as_bool().unwrap_or_else(|| word.is_some_and(|word| ["true", "yes", "on"].contains(&word.as_str())))
    }

    /// A list of texts, or one text alone.
    pub fn texts(&self) -> Vec<(&'a str, Self)> {
        match self.text() {
            Some(text) => vec![(text, self.clone())],
            None => self.items().into_iter().filter_map(|at| Some((at.text()?, at))).collect(),
        }
    }

    /// The name in `os.environ/NAME`.
    pub fn variable(&self) -> Option<&'a str> {
        let name = self.text()?.strip_prefix("os.environ/")?;
        let is_name =
            !name.is_empty() && name.len() <= 128 && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        is_name.then_some(name)
    }
}
