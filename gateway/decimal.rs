//! Decimal digits without the machinery of formatting, for what every request writes.

/// `00` to `99`.
const PAIRS: [[u8; 2]; 100] = {
    let (mut pairs, mut two) = ([[b'0'; 2]; 100], 0);
    while two < 100 {
        pairs[two as usize] = [b'0' + two / 10, b'0' + two % 10];
        two += 1;
    }
    pairs
};

/// A number's digits, in a part of `text`: two at a time, from behind.
pub fn digits(mut value: u64, text: &mut [u8; 20]) -> &[u8] {
    let (pairs, _) = text.as_chunks_mut::<2>();
    let mut begin = 20;
    for pair in pairs.iter_mut().rev() {
        let two = (value % 100) as usize;
        *pair = PAIRS[two];
        (value, begin) = (value / 100, begin - 2);
        if value == 0 {
            begin += usize::from(two < 10);
            break;
        }
    }
    &text[begin..]
}

/// The lowest digits of a number, as many as there is room for.
pub fn fill(digits: &mut [u8], mut value: u64) {
    for digit in digits.iter_mut().rev() {
        *digit = b'0' + (value % 10) as u8;
        value /= 10;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_are_what_formatting_writes() {
        for value in (0..=u64::from(u16::MAX)).chain([u64::from(u32::MAX), u64::MAX]) {
            assert_eq!(digits(value, &mut [0; 20]), value.to_string().as_bytes());
        }
    }
}
