//! A walk over a multipart form (RFC 7578) that notes where the parts `model` and `stream` stand.

use std::ops::Range;

use memchr::memmem;

use super::{Fault, Field, Scan};

/// More parts than any of the endpoints knows.
const PARTS_MAX: usize = 256;

pub(super) fn scan(body: &[u8], content_type: &[u8]) -> Result<Scan, Fault> {
    let boundary = boundary(content_type).ok_or(Fault::Malformed("Content-Type has no multipart boundary", 0))?;
    let mut scan = Scan { raw: true, ..Scan::default() };
    for part in parts(body, &boundary)? {
        let Some(field) = name(&body[part.head]).and_then(Field::named) else { continue };
        scan.put(field, part.content)?;
    }
    Ok(scan)
}

/// The names of all parts. Of a part whose name is not plain, nobody knows what a server takes it for.
pub(super) fn names(body: &[u8], content_type: &[u8]) -> Result<Vec<String>, Fault> {
    let named = each(body, content_type)?.into_iter();
    Ok(named.map(|(name, _)| name).collect())
}

/// Where the parts of this name stand.
pub(super) fn named(body: &[u8], content_type: &[u8], name: &str) -> Result<Vec<Range<usize>>, Fault> {
    let named = each(body, content_type)?.into_iter();
    Ok(named.filter(|(own, _)| own == name).map(|(_, span)| span).collect())
}

/// All parts with their names.
fn each(body: &[u8], content_type: &[u8]) -> Result<Vec<(String, Range<usize>)>, Fault> {
    let boundary = boundary(content_type).ok_or(Fault::Malformed("Content-Type has no multipart boundary", 0))?;
    let plain = |part: Part| {
        let name = plain_name(&body[part.head.clone()]);
        let name = name.ok_or(Fault::Malformed("a part must have one plain name", part.head.start))?;
        Ok((name, part.content))
    };
    parts(body, &boundary)?.into_iter().map(plain).collect()
}

/// The only `name` in a part's only `Content-Disposition`, if it is plain.
fn plain_name(head: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(head).ok()?;
    let is_disposition =
        |line: &&str| line.split(':').next().is_some_and(|key| key.trim().eq_ignore_ascii_case("content-disposition"));
    let folded = text.split("\r\n").any(|line| line.starts_with([' ', '\t']));
    let [line] = text.split("\r\n").filter(is_disposition).collect::<Vec<_>>()[..] else { return None };
    let is_name = |key: &str| key.trim().to_ascii_lowercase().starts_with("name");
    let keys = line.split(';').filter_map(|parameter| parameter.split_once('='));
    let [(key, value)] = keys.filter(|(key, _)| is_name(key)).collect::<Vec<_>>()[..] else { return None };
    let value = value.trim();
    let value = value.strip_prefix('"').map_or(Some(value), |rest| rest.strip_suffix('"'))?;
    let plain = value.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-.[]".contains(&byte));
    let good = !folded && plain && !value.is_empty() && key.trim().eq_ignore_ascii_case("name") && !line.contains('\\');
    good.then(|| value.to_owned())
}

/// The `boundary` parameter of a `multipart/form-data` type, quoted or not.
fn boundary(content_type: &[u8]) -> Option<Vec<u8>> {
    let text = std::str::from_utf8(content_type).ok()?;
    let (kind, parameters) = text.split_once(';')?;
    if !kind.trim().eq_ignore_ascii_case("multipart/form-data") {
        return None;
    }
    let value = parameters.split(';').find_map(|parameter| {
        let (key, value) = parameter.split_once('=')?;
        key.trim().eq_ignore_ascii_case("boundary").then(|| value.trim().trim_matches('"'))
    })?;
    (1..=70).contains(&value.len()).then(|| value.as_bytes().to_vec())
}

struct Part {
    head: Range<usize>,
    content: Range<usize>,
}

fn parts(body: &[u8], boundary: &[u8]) -> Result<Vec<Part>, Fault> {
    let dashed = [b"--", boundary].concat();
    let between = [b"\r\n--", boundary].concat();
    if !body.starts_with(&dashed) {
        return Err(Fault::Malformed("the form must begin with its boundary", 0));
    }
    let (mut parts, mut at) = (Vec::new(), dashed.len());
    while !body[at..].starts_with(b"--") {
        if parts.len() == PARTS_MAX {
            return Err(Fault::Malformed("more than 256 parts", at));
        }
        let part = part(body, at, &between)?;
        at = part.content.end + between.len();
        parts.push(part);
    }
    Ok(parts)
}

/// The part whose boundary line ends at `at`.
fn part(body: &[u8], at: usize, between: &[u8]) -> Result<Part, Fault> {
    let after = |from: usize, what: &[u8]| memmem::find(&body[from..], what).map(|found| from + found);
    let head = at + 2;
    if !body[at..].starts_with(b"\r\n") {
        return Err(Fault::Malformed("a boundary must end its line", at));
    }
    let blank = after(at, b"\r\n\r\n").ok_or(Fault::Malformed("a part has no blank line after its head", at))?;
    let end = after(blank + 2, between).ok_or(Fault::Malformed("a part never ends", at))?;
    // A part without content has its boundary right behind the blank line.
    Ok(Part { head: head.min(blank)..blank, content: (blank + 4).min(end)..end })
}

/// The `name` in a part's `Content-Disposition`.
fn name(head: &[u8]) -> Option<&[u8]> {
    let text = std::str::from_utf8(head).ok()?;
    let disposition = text.split("\r\n").find_map(|line| {
        let (key, value) = line.split_once(':')?;
        key.trim().eq_ignore_ascii_case("content-disposition").then_some(value)
    })?;
    disposition.split(';').find_map(|parameter| {
        let (key, value) = parameter.split_once('=')?;
        key.trim().eq_ignore_ascii_case("name").then(|| value.trim().trim_matches('"').as_bytes())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TYPE: &[u8] = b"multipart/form-data; boundary=xyz";
    const FORM: &[u8] = b"--xyz\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\nwhisper\r\n\
        --xyz\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a.wav\"\r\nContent-Type: audio/wav\r\n\r\n\
        \x00\x01\r\n--xy\r\n\r\n--xyz--\r\n";

    #[test]
    fn the_model_is_found_and_can_be_renamed() {
        let scan = scan(FORM, TYPE).unwrap();
        assert_eq!(scan.model(FORM).unwrap().unwrap(), "whisper");
        let edit = scan.rename_model("large").unwrap();
        assert_eq!(&FORM[edit.span], b"whisper");
        assert_eq!(edit.text, "large");
    }

    #[test]
    fn a_part_has_one_plain_name_or_none_is_told() {
        assert_eq!(names(FORM, TYPE).unwrap(), ["model", "file"]);
        let of = |line: &str| names(format!("--xyz\r\n{line}\r\n\r\na\r\n--xyz--").as_bytes(), TYPE);
        for (line, name) in [
            ("content-disposition:form-data;NAME=prompt", "prompt"),
            ("Content-Disposition: form-data; name=\"a[]\"; filename=\"x; y.wav\"", "a[]"),
        ] {
            assert_eq!(of(line).unwrap(), [name], "{line}");
        }
        for line in [
            "Content-Type: text/plain",
            "Content-Disposition: form-data",
            "Content-Disposition: form-data; name=\"\"",
            "Content-Disposition: form-data; name=a; name=prompt",
            "Content-Disposition: form-data; name=a; name*=UTF-8''prompt",
            "Content-Disposition: form-data; name*=UTF-8''prompt",
            "Content-Disposition: form-data; name=\"pro\\mpt\"",
            "Content-Disposition: form-data; name=\"a;b\"",
            "Content-Disposition: form-data; name=\"%70rompt\"",
            "Content-Disposition: form-data; filename=\"a; name=prompt\"; name=b",
            "Content-Disposition: form-data; name=a\r\nContent-Disposition: form-data; name=prompt",
            "Content-Disposition: form-data;\r\n name=prompt",
            "Content-Disposition: form-data; name=a;\r\n name=prompt",
        ] {
            assert!(of(line).is_err(), "{line}: {:?}", of(line));
        }
    }

    #[test]
    fn two_models_are_refused() {
        let part = "--xyz\r\nContent-Disposition: form-data; name=model\r\n\r\na\r\n";
        let form = format!("{part}{part}--xyz--");
        assert_eq!(scan(form.as_bytes(), TYPE), Err(Fault::Twice(Field::Model)));
    }

    #[test]
    fn every_cut_of_a_form_is_refused_and_none_panics() {
        let end = FORM.len() - b"--\r\n".len();
        for cut in 0..end {
            assert!(scan(&FORM[..cut], TYPE).is_err(), "{cut}");
        }
    }

    #[test]
    fn an_empty_part_is_empty() {
        let form = b"--xyz\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\n\r\n--xyz--";
        assert_eq!(scan(form, TYPE).unwrap().model(form).unwrap().unwrap(), "");
    }
}
