//! Hexadecimal digits.

const DIGITS: &[u8; 16] = b"0123456789abcdef";

/// Bytes as digits: `N` is twice their number.
pub fn digits<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut digits = [b'0'; N];
    for (two, byte) in digits.chunks_exact_mut(2).zip(bytes) {
        two.copy_from_slice(&[DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]]);
    }
    digits
}

/// Bytes as text.
pub fn text(bytes: &[u8]) -> String {
    bytes.iter().flat_map(|byte| digits::<2>(&[*byte])).map(char::from).collect()
}

/// The bytes that digits stand for.
pub fn bytes(digits: &[u8]) -> Option<Vec<u8>> {
    let digit = |digit: u8| char::from(digit).to_digit(16);
    let byte = |two: &[u8]| u8::try_from(digit(two[0])? << 4 | digit(two[1])?).ok();
    if digits.len().is_multiple_of(2) { digits.chunks_exact(2).map(byte).collect() } else { None }
}

/// The number that at most 32 digits stand for; lower case only, as trace context has it.
pub fn number(digits: &[u8]) -> Option<u128> {
    digits.iter().try_fold(0, |value, digit| {
        let digit = DIGITS.iter().position(|known| known == digit)?;
        Some(value << 4 | digit as u128)
    })
}

/// The lowest digits of a number, as many as there is room for.
pub fn spell(digits: &mut [u8], mut value: u128) {
    for digit in digits.iter_mut().rev() {
        *digit = DIGITS[(value & 15) as usize];
        value >>= 4;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_and_digits_stand_for_each_other() {
        assert_eq!(text(&[0, 0x1f, 0xa0, 0xff]), "001fa0ff");
        assert_eq!(digits::<4>(&[0x1f, 0xa0]), *b"1fa0");
        assert_eq!(bytes(b"001fA0ff"), Some(vec![0, 0x1f, 0xa0, 0xff]));
        assert_eq!(number(b"1fa0"), Some(0x1fa0));
        let mut spelt = [0; 6];
        spell(&mut spelt, 0x1_23fa_0bcd);
        assert_eq!(spelt, *b"fa0bcd");
    }

    #[test]
    fn what_is_no_digit_is_refused() {
        for wrong in [&b"0"[..], b"+f", b"0g", b"\xc3\xa9", b" 0"] {
            assert_eq!(bytes(wrong), None, "{wrong:?}");
        }
        assert_eq!((number(b"1F"), number(b"-1"), bytes(b"")), (None, None, Some(vec![])));
    }
}
