//! Decimal digits without the machinery of formatting, for what every request writes.

/// A number's digits, in a part of `text`.
pub fn digits(mut value: u64, text: &mut [u8; 20]) -> &[u8] {
    let mut begin = text.len();
    for (at, digit) in text.iter_mut().enumerate().rev() {
        (*digit, begin) = (b'0' + (value % 10) as u8, at);
        value /= 10;
        if value == 0 {
            break;
        }
    }
    &text[begin..]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_are_what_formatting_writes() {
        for value in [0, 9, 10, 99, 100, 4_711, u64::from(u32::MAX), u64::MAX] {
            assert_eq!(digits(value, &mut [0; 20]), value.to_string().as_bytes());
        }
    }
}
