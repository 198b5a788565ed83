//! The ratios as a picture: a bar a case, and a line where the bare proxy is.

use crate::report::Row;
use std::fmt::Write;

/// A line of the picture, in pixels.
const LINE: usize = 22;
/// Where bars begin.
const LEFT: f64 = 260.0;
/// How long the bar of the bare proxy would be.
const BARE: f64 = 240.0;
/// Longer bars are cut off.
const RATIO_MAX: f64 = 2.0;

/// The picture of all rows that have a ratio.
pub fn svg(rows: &[Row]) -> String {
    let ratios: Vec<(&str, f64)> = rows.iter().filter_map(|row| Some((&*row.case, ratio(row)?))).collect();
    let (width, height) = (LEFT + BARE * RATIO_MAX + 60.0, (ratios.len() + 2) * LINE);
    let mut svg = format!(
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' font-family='sans-serif' font-size='12'>\n\
         <rect width='100%' height='100%' fill='white'/>\n<text x='{LEFT}' y='15' fill='#555'>CPU time by a bare \
         pass-through's; the line is 1</text>\n"
    );
    for (at, (case, ratio)) in ratios.iter().enumerate() {
        bar(&mut svg, (at + 1) * LINE, case, *ratio);
    }
    let line = LEFT + BARE;
    let _ = writeln!(svg, "<line x1='{line}' y1='{LINE}' x2='{line}' y2='{height}' stroke='#333'/>\n</svg>");
    svg
}

fn ratio(row: &Row) -> Option<f64> {
    row.result.as_ref().ok()?.ratio()
}

fn bar(svg: &mut String, top: usize, case: &str, ratio: f64) {
    let length = BARE * ratio.min(RATIO_MAX);
    let colour = if ratio <= 1.0 { "#2a7f62" } else { "#b5651d" };
    let (text, label, end) = (top + 15, LEFT - 8.0, LEFT + length + 6.0);
    let _ = writeln!(
        svg,
        "<text x='{label}' y='{text}' text-anchor='end'>{case}</text>\
         <rect x='{LEFT}' y='{}' width='{length:.0}' height='14' fill='{colour}'/>\
         <text x='{end:.0}' y='{text}'>{ratio:.2}</text>",
        top + 4
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Figures, Goal};

    #[test]
    fn every_ratio_has_a_bar_and_what_has_none_is_left_out() {
        let row = |case: &str, rounds: &[(f64, f64)]| Row {
            case: case.into(),
            unit: "µs",
            result: Ok(Figures::of_rounds(rounds)),
            goal: Goal::None,
        };
        let drawn = svg(&[row("cheap", &[(2.0, 1.0)]), row("dear", &[(1.0, 9.0)]), row("nothing", &[])]);
        assert!(drawn.contains(">cheap<") && drawn.contains(">0.50<") && drawn.contains(">9.00<"));
        assert!(drawn.contains("width='480'") && !drawn.contains("nothing"));
    }
}
