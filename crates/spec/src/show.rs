//! Answers for the way back: a plan as one line, a driver's usage as one line.

use devsplice_core::Arity;

use crate::{Kind, Plan};

/// A plan as an expression: lower devices first, then keys, in the order of [`crate::Place`].
pub(crate) fn expression(plan: &Plan) -> String {
    let mut line = String::new();
    device(plan, plan.root, &mut line);
    line
}

/// Calls itself as deep as the stack is, which the plan bounds.
fn device(plan: &Plan, place: usize, line: &mut String) {
    let place = &plan.places[place];
    line.push_str(place.kind.name());
    line.push('(');
    let mut comma = "";
    for &lower in &place.below {
        line.push_str(comma);
        device(plan, lower, line);
        comma = ", ";
    }
    for (key, value) in &place.given {
        line.push_str(comma);
        if place.kind.main_key() != Some(key) {
            line.push_str(key);
            line.push('=');
        }
        line.push_str(&quote(value));
        comma = ", ";
    }
    line.push(')');
}

/// A value as it must be typed.
fn quote(value: &str) -> String {
    let special = |c: char| c.is_whitespace() || c.is_control() || "\"\\(),=".contains(c);
    // In front, a bracket begins a command.
    if !value.is_empty() && !value.starts_with('[') && !value.contains(special) {
        return value.to_owned();
    }
    format!("\"{}\"", value.replace('\\', "\\\\").replace('"', "\\\""))
}

/// How a driver is written: `stripe(DEVICE, ..., [chunk=SIZE])`.
pub(crate) fn usage(kind: Kind) -> String {
    let below: &[&str] = match kind.below() {
        Arity::None => &[],
        Arity::One => &["DEVICE"],
        Arity::Many => &["DEVICE", "..."],
    };
    let keys = kind.keys().iter().map(|key| {
        let is_main = kind.main_key() == Some(key.name);
        let pair = if is_main { key.name.to_uppercase() } else { pair(key) };
        if key.required { pair } else { format!("[{pair}]") }
    });
    let all: Vec<_> = below.iter().map(|word| (*word).to_owned()).chain(keys).collect();
    format!("usage: {}({})", kind.name(), all.join(", "))
}

fn pair(key: &devsplice_core::Key) -> String {
    format!("{}={}", key.name, key.kind.hint())
}
