//! Answers for the one-line form: what it means, and what is said where it goes wrong.

mod common;

use common::{canonical, parse, refusal};

#[test]
fn each_way_to_write_a_stack_means_the_same_one() {
    for (text, want) in [
        ("/a.img", "file(/a.img)"),
        ("./a.img", "file(./a.img)"),
        ("../a.img", "file(../a.img)"),
        ("file:/a.img", "file(/a.img)"),
        ("file : /a.img ", "file(/a.img)"),
        ("file(path=/a.img)", "file(/a.img)"),
        ("file(direct=off, /a.img)", "file(/a.img, direct=off)"),
        ("file(block=4k, direct = off,path=/a)", "file(/a, direct=off, block=4k)"),
        ("mem:1G", "mem(1G)"),
        ("mem(1G)", "mem(1G)"),
        ("mem(size=1G)", "mem(1G)"),
        ("keyless()", "keyless()"),
        ("linear(/a, offset=1M)", "linear(file(/a), offset=1M)"),
        ("linear(size=2M,offset=1M,/a)", "linear(file(/a), offset=1M, size=2M)"),
        (" stripe ( chunk=4k,\n\tmem:1M , mem(1M) ) ", "stripe(mem(1M), mem(1M), chunk=4k)"),
        ("concat(null(size=1M), zero(size=1M))", "concat(null(size=1M), zero(size=1M))"),
        ("linear(/a=b)", "linear(file(\"/a=b\"))"),
        ("linear(file:/a(1).img, offset=4k)", "linear(file(\"/a(1).img\"), offset=4k)"),
        ("/a b.img", "file(\"/a b.img\")"),
        ("\"/a, (b\"", "file(\"/a, (b\")"),
        (r#"file("a \"b\" \\ c")"#, r#"file("a \"b\" \\ c")"#),
        (r#"linear("/x,y", offset="1M")"#, r#"linear(file("/x,y"), offset=1M)"#),
        (r#"file("")"#, r#"file("")"#),
        ("file:a.img", "file(a.img)"),
        ("/\u{e9}\u{1f4be}.img", "file(/\u{e9}\u{1f4be}.img)"),
    ] {
        assert_eq!(canonical(text), want, "{text}");
        assert_eq!(canonical(want), want, "{text}");
    }
}

#[test]
fn places_come_lower_devices_first_and_have_labels_of_their_own() {
    let plan = parse("concat(linear(/a), linear(/b), mem:1M)").unwrap();
    let labels: Vec<_> = plan.places.iter().map(|place| place.label.as_str()).collect();
    assert_eq!(labels, ["file", "linear", "file#2", "linear#2", "mem", "concat"]);
    let below: Vec<_> = plan.places.iter().map(|place| place.below.clone()).collect();
    assert_eq!(below, [vec![], vec![0], vec![], vec![2], vec![], vec![1, 3, 4]]);
    assert_eq!(plan.root, 5);
    assert_eq!(plan.places[0].args.text("path"), Some("/a"));
}

/// Text, the character that the caret must point at (a space for the end), part of the message.
const BAD: &[(&str, char, &str)] = &[
    ("", ' ', "column 1: the text ends: expected a device: NAME(...)"),
    ("   ", ' ', "column 4: the text ends: expected a device"),
    ("linaer(/a)", 'l', "linaer: no such driver; did you mean linear? one of linear, concat"),
    ("concat(/a, strip(/b))", 's', "column 12: strip: no such driver; did you mean stripe?"),
    ("disk.img", 'd', "a path begins with /, ./ or ../"),
    ("linear", ' ', "expected ( after linear: usage: linear(DEVICE, [offset=SIZE], [size=SIZE])"),
    ("linear[/a]", '[', "column 7: `[`: expected ( after linear"),
    ("linear(/a", ' ', "column 10: the text ends: expected , or )"),
    ("linear(mem:1M; /a)", 'm', "mem: size: `1M; /a` is no size"),
    ("linear(mem(1M) x)", 'x', "column 16: `x`: expected , or )"),
    ("linear(/a,)", ')', "column 11: `)`: expected a device"),
    ("linear(,/a)", ',', "column 8: `,`: expected a device"),
    ("linear(/a) x", 'x', "column 12: `x`: expected the end"),
    ("/a, /b", ',', "expected the end; quote a path that holds , ( or )"),
    ("linear(/a))", ')', "column 11: `)`: expected the end"),
    ("linear(/a, offset=)", ')', "column 19: `)`: expected a value"),
    ("linear(/a, offset=1x)", 'o', "linear: offset: `1x` is no size; examples: 4096, 64k"),
    ("linear(/a, ofset=1M)", 'o', "unknown key `ofset`; valid keys: offset, size"),
    ("linear(/a, size=1M, size=2M)", 's', "linear: key `size` is given twice"),
    ("mem(1G, size=2G)", 's', "mem: key `size` is given twice"),
    ("mem(1G, 2G)", '2', "mem: key `size` is given twice"),
    ("mem()", 'm', "mem: key `size` is missing; add size=SIZE (bytes)"),
    ("null()", 'n', "null: key `size` is missing"),
    ("keyless(x)", 'x', "keyless: takes no value without a key; usage: keyless()"),
    ("keyless(x=1)", 'x', "keyless: unknown key `x`; keyless takes no keys"),
    ("linear:/a", 'l', "linear: takes no value without a key; usage: linear(DEVICE"),
    ("linear(/a, /b)", 'l', "linear: lies over exactly one device, 2 given; usage: linear(DEVICE"),
    ("linear()", 'l', "linear: lies over exactly one device, 0 given"),
    ("null(/a, size=1M)", 'n', "null: lies over nothing, 1 given; usage: null(size=SIZE"),
    ("stripe(chunk=4k)", 's', "stripe: lies over one device or more, 0 given; usage: stripe(DEV"),
    ("delay(/a, read=5)", 'r', "delay: read: `5` is no duration"),
    ("error(/a, read=EFOO)", 'r', "`EFOO` is no error name; one of EPERM"),
    ("file(/a, direct=maybe)", 'd', "`maybe` is neither on nor off"),
    ("\"linear(/a)\"", '"', "expected a device"),
    ("file(\"/a)", '"', "this quote is never closed"),
    (r#"file("a\n")"#, '\\', "inside quotes only"),
    ("file(/a\"b)", '"', "a quote inside a word"),
    ("file(/a((b)", '/', "opens more parentheses than it closes"),
    (
        "stripe(/a,\n  nul(size=1M))",
        'n',
        "line 2, column 3: nul: no such driver; did you mean null",
    ),
];

#[test]
fn each_mistake_is_named_and_pointed_at() {
    for (text, pointed, part) in BAD {
        let message = refusal(parse(text));
        assert!(message.contains(part), "{text}\n{message}");
        let lines: Vec<_> = message.lines().collect();
        let [.., excerpt, caret] = lines[..] else { panic!("no excerpt: {message}") };
        let place = caret.chars().count() - 1;
        assert_eq!(excerpt.chars().nth(place).unwrap_or(' '), *pointed, "{message}");
    }
}

#[test]
fn a_message_reads_like_this() {
    let want = "column 8: linaer: no such driver; did you mean linear? one of ";
    let message = refusal(parse("linear(linaer(/x.img), offset=1M)"));
    assert!(message.starts_with(want), "{message}");
    assert!(
        message.ends_with("\n    linear(linaer(/x.img), offset=1M)\n           ^"),
        "{message}"
    );
}

#[test]
fn bounds_end_in_an_error_and_not_in_an_overflow() {
    let deep = |count: usize| format!("{}/a{}", "linear(".repeat(count), ")".repeat(count));
    assert!(parse(&deep(12)).is_ok());
    assert!(refusal(parse(&deep(13))).contains("more than 12 layers above one another"));
    assert!(refusal(parse(&deep(5000))).contains("more than 64 devices inside one another"));
    let huge = "linear(".repeat(100_000);
    assert!(refusal(parse(&huge)).contains("700000 bytes, the most is 65536"));
    assert!(refusal(parse(&huge[..65_000])).contains("more than 64 devices"));
    assert!(refusal(parse(&format!("/{}", "(".repeat(60_000)))).contains("parentheses"));
    let wide = |count: usize| format!("concat({})", vec!["mem:1M"; count].join(","));
    assert!(parse(&wide(4000)).is_ok());
    assert!(refusal(parse(&wide(4001))).contains("at most 4000 devices, 4001 given"));
    assert!(refusal(parse(&wide(5000))).contains("more than 4096 devices"));
}

#[test]
fn an_address_or_a_command_in_brackets_is_a_device() {
    for (text, shown) in [
        ("nbd://host/name", "nbd(nbd://host/name)"),
        ("nbd://[::1]:7/a%2Cb", "nbd(nbd://[::1]:7/a%2Cb)"),
        (
            "linear(nbd+unix:///?socket=/s, offset=4k)",
            "linear(nbd(\"nbd+unix:///?socket=/s\"), offset=4k)",
        ),
        ("nbd(nbd+vsock://2:1/, connections=2)", "nbd(nbd+vsock://2:1/, connections=2)"),
        ("nbd:unix:/s", "nbd(unix:/s)"),
        ("[ nbdkit memory 1G ]", "nbd(\"[ nbdkit memory 1G ]\")"),
        (
            "stripe([ a b, c [d] ], nbds+unix://h)",
            "stripe(nbd(\"[ a b, c [d] ]\"), nbd(nbds+unix://h))",
        ),
    ] {
        assert_eq!(canonical(text), shown);
        assert_eq!(canonical(shown), shown);
    }
    for (text, word) in [
        ("[ nbdkit", "never closed"),
        ("http://h", "no such driver"),
        ("nbd", "nbd"),
        ("nbd:", "value"),
    ] {
        assert!(refusal(parse(text)).contains(word), "{text}");
    }
}
