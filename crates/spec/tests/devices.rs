//! Answers for the TOML form, for `load`, and for files that are used twice.
#![allow(clippy::unwrap_used)]

mod common;

use common::{CATALOG, parse, refusal, toml};
use devsplice_core::ErrorKind;
use devsplice_spec::Plan;
use std::path::PathBuf;

const GOOD: &str = r#"
stack = "data"
[device.data]
driver = "stripe"
chunk = "64k"
below = ["a", "linear(b.img:x, offset=1M)", "c"]
[device.a]
driver = "file"
path = "/a.img"
direct = false
block = 4096
[device.c]
driver = "linear"
below = "/c.img"
"#;

#[test]
fn names_and_inline_expressions_make_one_stack() {
    let text = GOOD.replace("b.img:x", "./b.img");
    let plan = toml(&text).unwrap();
    let line = "stripe(file(/a.img, direct=off, block=4096), linear(file(./b.img), offset=1M), \
                linear(file(/c.img)), chunk=64k)";
    assert_eq!(plan.to_expression(), line);
    let labels: Vec<_> = plan.places.iter().map(|place| place.label.as_str()).collect();
    assert_eq!(labels, ["a", "file", "linear", "file#2", "c", "data"]);
    assert_eq!(plan.root, 5);
    assert_eq!(toml("stack = 'linear(mem:1M)'").unwrap().to_expression(), "linear(mem(1M))");
}

#[test]
fn a_label_of_its_own_is_found_beside_given_names() {
    let plan = toml("stack='linear'\n[device.linear]\ndriver='linear'\nbelow='linear(mem:1M)'");
    let labels: Vec<_> = plan.unwrap().places.into_iter().map(|place| place.label).collect();
    assert_eq!(labels, ["mem", "linear#2", "linear"]);
}

#[test]
fn each_mistake_is_named() {
    let mem = "[device.m]\ndriver='mem'\nsize='1M'\n";
    let over = |more: &str| format!("stack='x'\n[device.x]\ndriver='linear'\n{more}\n{mem}");
    for (text, part) in [
        (String::new(), "stack file: key `stack` is missing; add stack = \"NAME\""),
        ("stack = [".to_owned(), "TOML: TOML parse error at line 1, column 10"),
        ("stack = 5".to_owned(), "stack: integer, not a string"),
        (
            "stack='m'\ndevices=1\n".to_owned() + mem,
            "unknown key `devices`; valid keys: stack, dev",
        ),
        ("stack='m'\ndevice=1".to_owned(), "device: not a table; write [device.NAME]"),
        ("stack='m'\n[device]\nm=1".to_owned(), "device.m: integer: expected a table; write [dev"),
        (
            "stack='m'\n[device.m]\nsize=1".to_owned(),
            "device.m: driver: key is missing; one of lin",
        ),
        (format!("stack='n'\n{mem}"), "stack: there is no device `n`; one of m"),
        (over("below=['mm']"), "device.x: there is no device `mm`; one of m, x"),
        (over("below=['linaer(m)']"), "device.x: column 1: linaer: no such driver; did you mean"),
        (over("below=[5]"), "device.x: below: integer, not a string"),
        (
            over("below='m'\nofset=1"),
            "device.x: linear: unknown key `ofset`; valid keys: offset, s",
        ),
        (over("below='m'\noffset=1.5"), "device.x: offset: float, not a string, integer or bool"),
        (over("below='m'\noffset=-1"), "device.x: linear: offset: `-1` is no size"),
        (over("below=['m', '/a']"), "device.x: linear: lies over exactly one device, 2 given"),
        (over("below=['x']"), "device.x: lies below itself; break the circle x -> x"),
        (over("below='mem:1M'"), "stack file: not used: m; name them under `below`"),
        (format!("stack='m'\n{mem}below='/a'"), "device.m: mem: lies over nothing, 1 given"),
        (mem.replace("mem", "memm") + "[x]", "device.m: memm: no such driver; did you mean mem?"),
    ] {
        let message = refusal(toml(&text));
        assert!(message.contains(part), "{text}\n{message}");
    }
}

#[test]
fn a_circle_is_shown_and_a_shared_device_names_both_users() {
    let ring = "stack='a'\n[device.a]\ndriver='linear'\nbelow='b'\n\
                [device.b]\ndriver='linear'\nbelow='c'\n[device.c]\ndriver='linear'\nbelow='b'";
    let message = refusal(toml(ring));
    assert!(message.contains("device.b: lies below itself; break the circle b -> c -> b"));
    let shared = "stack='a'\n[device.a]\ndriver='concat'\nbelow=['b', 'm']\n\
                  [device.b]\ndriver='linear'\nbelow='m'\n[device.m]\ndriver='mem'\nsize='1M'";
    let message = refusal(toml(shared));
    assert!(message.contains("device.m: used twice: by device.b and device.a"), "{message}");
}

#[test]
fn a_long_chain_of_names_ends_in_an_error() {
    let chain = |count: usize| {
        let mut text = "stack='d0'\n".to_owned();
        for n in 0..count {
            text += &format!("[device.d{n}]\ndriver='linear'\nbelow='d{}'\n", n + 1);
        }
        text + &format!("[device.d{count}]\ndriver='mem'\nsize='1M'\n")
    };
    assert!(toml(&chain(12)).is_ok());
    assert!(refusal(toml(&chain(13))).contains("more than 12 layers"));
    assert!(refusal(toml(&chain(5000))).contains("more than 64 devices above one another"));
    let deep = format!("stack = {}", "[".repeat(100_000));
    assert!(refusal(toml(&deep)).contains("TOML"));
    assert!(refusal(toml(&"#".repeat(2 << 20))).contains("the most is 1048576"));
}

/// A directory that goes away with the test.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Scratch {
        let path = std::env::temp_dir().join(format!("devsplice-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Scratch(path)
    }

    fn file(&self, name: &str, text: &str) -> String {
        let path = self.0.join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn one_file_under_two_names_is_used_once_unless_all_uses_are_read_only() {
    let dir = Scratch::new("twice");
    let a = dir.file("a", "");
    let (hard, soft, other) = (dir.path("hard"), dir.path("soft"), dir.file("other", ""));
    std::fs::hard_link(&a, &hard).unwrap();
    std::os::unix::fs::symlink(&a, &soft).unwrap();
    for second in [&a, &hard, &soft] {
        let message = refusal(parse(&format!("concat({a}, mem:1M, {second})")));
        let want =
            format!("file#2 ({second}): the same file as file ({a}), and not both are read-");
        assert!(message.contains(&want), "{message}");
        let mixed = format!("concat(file({a}, readonly=on), {second})");
        assert!(refusal(parse(&mixed)).contains("readonly=on"));
        let both = format!("concat(file({a}, readonly=on), file({second}, readonly=on))");
        assert!(parse(&both).is_ok());
        assert!(parse(&format!("concat(file({a}, readonly=on), {both}, {second})")).is_err());
    }
    assert!(parse(&format!("concat({a}, {other}, /dev/null, /dev/null)")).is_ok());
    assert!(parse("concat(/nowhere/x, /nowhere/x)").is_ok());
}

#[test]
fn load_reads_a_stack_file_and_takes_all_else_as_an_expression() {
    let dir = Scratch::new("load");
    let load = |arg: &str| Plan::load(arg, &CATALOG);
    let good = dir.file("good.toml", "stack = 'mem:1M'");
    assert_eq!(load(&good).unwrap().to_expression(), "mem(1M)");
    let bad = dir.file("bad.toml", "stack = 'memm:1M'");
    let want = format!("{bad}: stack: column 1: memm: no such driver");
    assert!(load(&bad).unwrap_err().to_string().starts_with(&want));
    let missing = load(&dir.path("missing.toml")).unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::NotFound);
    assert_eq!(load("linear(file:x.toml)").unwrap().to_expression(), "linear(file(x.toml))");
    assert_eq!(load("file:x.toml").unwrap().to_expression(), "file(x.toml)");
    std::fs::write(&bad, [0xff]).unwrap();
    assert!(load(&bad).is_err());
}
