//! Answers for the control socket: the protocol to the letter, and clients that are rude.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use devsplice_e2e::{
    Group, Kind, MIB, Outcome, Room, Server, Talk, call, need, need_tool, wait_until,
};
use serde_json::{Value, json};

/// For a client that runs as another user.
const PYTHON: &str = "/usr/bin/python3";

pub fn add(group: &mut Group, kind: Kind) {
    group.add("rpc_speaks_json_rpc_2_to_the_letter", move || letter(kind));
    group.add("rpc_schema_is_what_is_done", move || schema(kind));
    group.add("rpc_rude_clients_harm_nobody", move || rude(kind));
    group.add("rpc_gives_nothing_to_other_users", move || others(kind));
    group.add("rpc_events_tell_what_happens", move || events(kind));
}

fn add_disk(room: &Room, kind: Kind, server: &Server<'_>, stack: &str) -> String {
    let arguments = room.add_arguments(kind, stack, &["--no-part-scan", "--server", &server.name]);
    let _ = room.devsplice(&arguments).ok();
    arguments.last().cloned().unwrap_or_default()
}

fn letter(kind: Kind) -> Outcome {
    let room = Room::new();
    let server = Server::start(&room, &["--threads", "1"]);
    let name = add_disk(&room, kind, &server, "null(size=16M)");
    let mut talk = server.talk();
    let mut say = |text: &str| {
        assert!(talk.say(format!("{text}\n").as_bytes()));
        talk.hear()
    };
    let code = |answer: &Value| {
        assert_eq!(answer["jsonrpc"], "2.0", "{answer}");
        assert!(answer.get("result").is_none(), "{answer}");
        (answer["error"]["code"].as_i64().unwrap(), answer["id"].clone())
    };
    let id = |text: &str| json!(text);
    assert_eq!(code(&say("{\"jsonrpc\": \"2.0\", \"method")), (-32700, Value::Null));
    for bad in ["1", "{}", "[]", "[1]", r#"{"jsonrpc":"2.0","method":1,"id":"a"}"#] {
        let answer = say(bad);
        let answer = if bad == "[1]" { &answer[0] } else { &answer };
        assert_eq!(code(answer).0, -32600, "{bad}");
    }
    let wrong = r#"{"jsonrpc":"1.0","method":"list","id":"a"}"#;
    assert_eq!(code(&say(wrong)), (-32600, id("a")));
    let unknown = r#"{"jsonrpc":"2.0","method":"nope","id":"a"}"#;
    assert_eq!(code(&say(unknown)), (-32601, id("a")));
    let surplus = r#"{"jsonrpc":"2.0","method":"list","id":"a","params":{"x":1}}"#;
    assert_eq!(code(&say(surplus)), (-32602, id("a")));
    let missing = r#"{"jsonrpc":"2.0","method":"info","id":5,"params":{"disk":"no such"}}"#;
    assert_eq!(code(&say(missing)), (-32000, json!(5)));
    // By position; the identifier comes back as it was.
    let info = say(&format!(r#"{{"jsonrpc":"2.0","method":"info","id":1.5,"params":["{name}"]}}"#));
    assert_eq!((&info["id"], &info["result"]["name"]), (&json!(1.5), &json!(name)));
    // Of a batch with notifications, one of them of no method, only the requests are answered.
    let batch = say(concat!(
        r#"[{"jsonrpc":"2.0","method":"list"},{"jsonrpc":"2.0","method":"nope"},"#,
        r#"{"jsonrpc":"2.0","method":"list","id":1},7,{"jsonrpc":"2.0","method":"nope","id":2},"#,
        r#"{"jsonrpc":"2.0","method":"shutdown","id":3}]"#
    ));
    let ids: Vec<_> = batch.as_array().unwrap().iter().map(|one| one["id"].clone()).collect();
    assert_eq!(ids, [json!(1), Value::Null, json!(2), json!(3)], "{batch}");
    assert_eq!(batch[0]["result"][0]["name"], *name);
    assert_eq!(batch[3]["error"]["code"], -32600, "nothing is left to answer after a shutdown");
    // A notification does what it asks for, and nothing is heard of it.
    let gone = format!(r#"{{"jsonrpc":"2.0","method":"del","params":{{"disk":"{name}"}}}}"#);
    assert!(talk.say(format!("{gone}\n\n").as_bytes()));
    assert_eq!(talk.result("list", &json!({})), json!([]));
    drop(talk);
    server.end();
    Ok(())
}

/// A value that no parameter of this schema takes.
fn misfit(schema: &Value) -> Value {
    if schema["type"] == "boolean" { json!("yes") } else { json!(true) }
}

fn schema(kind: Kind) -> Outcome {
    let room = Room::new();
    let server = Server::start(&room, &["--threads", "1"]);
    let name = add_disk(&room, kind, &server, "null(size=16M)");
    let mut talk = server.talk();
    let schema = talk.result("schema", &json!({}));
    let methods = schema["methods"].as_object().unwrap();
    for (method, about) in methods {
        assert!(!about["description"].as_str().unwrap().is_empty(), "{method}");
        for (param, is) in about["params"]["properties"].as_object().unwrap() {
            let params = json!({ param: misfit(is) });
            assert_eq!(talk.code(method, &params), -32602, "{method} {params}");
        }
        assert_eq!(talk.code(method, &json!({ "no such": 1 })), -32602, "{method}");
        let required = about["params"]["required"].as_array().unwrap();
        if !required.is_empty() {
            assert_eq!(talk.code(method, &json!({})), -32602, "{method} needs {required:?}");
        }
    }
    let mut is_of_type = |method: &str, params: Value| {
        let result = talk.result(method, &params);
        let fits = match methods[method]["result"]["type"].as_str().unwrap() {
            "object" => result.is_object(),
            "array" => result.is_array(),
            "string" => result.is_string(),
            other => panic!("{method} gives {other}"),
        };
        assert!(fits, "{method}: {result}");
    };
    is_of_type("list", json!({}));
    is_of_type("info", json!({ "disk": name }));
    is_of_type("save", json!({}));
    let (other, file) = (room.name(), room.file("other", 16 * MIB));
    let config = format!("[[disk]]\nname = \"{other}\"\nexport = \"auto\"\nstack = \"{file}\"\n");
    is_of_type("load", json!({ "config": config }));
    is_of_type("resize", json!({ "disk": other }));
    is_of_type("del", json!({ "disk": other }));
    is_of_type("stop", json!({ "disk": name, "force": true }));
    is_of_type("schema", json!({}));
    is_of_type("shutdown", json!({}));
    talk.ends();
    wait_until(10, "no state", || room.state().is_empty());
    Ok(())
}

fn rude(kind: Kind) -> Outcome {
    let room = Room::new();
    let server = Server::start(&room, &["--threads", "1"]);
    let name = add_disk(&room, kind, &server, "null(size=16M)");
    let works = || {
        let start = Instant::now();
        let info = server.talk().result("info", &json!({ "disk": name }));
        assert_eq!(info["state"], "live");
        assert!(start.elapsed() < Duration::from_secs(20), "others wait {:?}", start.elapsed());
    };
    // Garbage, then a good request on the same line of talk; half a request, then nothing.
    let mut talk = server.talk();
    assert!(talk.say(b"\xff\x00\xfegarbage\n"));
    assert_eq!(talk.hear()["error"]["code"], -32700);
    assert!(talk.result("list", &json!({})).is_array());
    let mut half = server.talk();
    assert!(half.say(b"{\"jsonrpc\": \"2.0\", \"id\": 1, \"met"));
    works();
    // One byte at a time, slower than its time is long.
    let slow = std::thread::spawn({
        let mut talk = server.talk();
        move || {
            let start = Instant::now();
            while talk.say(b" ") && start.elapsed() < Duration::from_secs(60) {
                std::thread::sleep(Duration::from_millis(500));
            }
            start.elapsed()
        }
    });
    // No end of a line in sight: refused, not kept.
    let mut long = server.talk();
    let chunk = vec![b'['; 1 << 20];
    let _ = (0..8).all(|_| long.say(&chunk));
    drop(long);
    // Deep nesting overflows no stack.
    let mut deep = server.talk();
    assert!(deep.say(&[&[b'['; 100_000][..], b"\n"].concat()));
    assert_eq!(deep.hear()["error"]["code"], -32700);
    // A client that asks and never reads.
    let mut deaf = server.talk();
    let ask = b"{\"jsonrpc\": \"2.0\", \"id\": 1, \"method\": \"schema\"}\n";
    let deaf = std::thread::spawn(move || {
        let start = Instant::now();
        while deaf.say(ask) && start.elapsed() < Duration::from_secs(60) {}
        start.elapsed()
    });
    works();
    // More than there are places: who is turned away is told so, and others get in later.
    let crowd: Vec<Talk> = (0..80).map(|_| server.talk()).collect();
    let mut late = server.talk();
    let told = late.hear();
    assert!(told["error"]["message"].as_str().unwrap_or_default().contains("clients"), "{told}");
    drop(crowd);
    std::thread::sleep(Duration::from_millis(300));
    works();
    assert!(slow.join().unwrap() < Duration::from_secs(30), "a slow client stays for ever");
    assert!(deaf.join().unwrap() < Duration::from_secs(30), "a deaf client stays for ever");
    half.ends();
    drop((talk, deep, late));
    let threads = server.process().threads();
    assert!(threads.len() < 12, "{threads:?}");
    server.end();
    Ok(())
}

fn others(kind: Kind) -> Outcome {
    need_tool("setpriv")?;
    need(Path::new(PYTHON).exists(), "no python3 that other users may start")?;
    let room = Room::new();
    let server = Server::start(&room, &["--threads", "1"]);
    let _ = add_disk(&room, kind, &server, "null(size=16M)");
    let disk = room.add(kind, "null(size=16M)", &["--no-part-scan"]);
    let own = room.run.join(format!("{}.sock", disk.name));
    for socket in [server.socket(), own] {
        let mode = std::fs::metadata(&socket).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{}", socket.display());
        // Even where somebody has opened all doors.
        for (path, mode) in [(&room.run, 0o755), (&socket, 0o666)] {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
        }
        let ask = "import socket,sys\ns=socket.socket(socket.AF_UNIX)\ns.settimeout(10)\n\
                   s.connect(sys.argv[1])\n\
                   try:\n s.sendall(b'{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"list\"}\\n')\n\
                   except OSError: pass\n\
                   try: print(len(s.recv(100)))\nexcept ConnectionError: print(0)\n";
        let path = socket.display().to_string();
        let heard = |user: &str| {
            let id = [format!("--reuid={user}"), format!("--regid={user}")];
            let rest = ["--clear-groups", PYTHON, "-c", ask, &path].map(str::to_owned);
            call("setpriv", id.into_iter().chain(rest)).ok().trim().to_owned()
        };
        assert_eq!(heard("65534"), "0", "another user hears something");
        assert_ne!(heard("0"), "0", "root hears nothing");
    }
    disk.remove();
    server.end();
    Ok(())
}

fn events(kind: Kind) -> Outcome {
    let room = Room::new();
    let server = Server::start(&room, &["--threads", "1"]);
    let mut talk = server.talk();
    let mut follower = server.talk();
    assert_eq!(follower.result("events", &json!({})), "following");
    assert_eq!(follower.hear()["method"], "following");
    let wished = talk.result("list", &json!({}));
    assert_eq!(wished, json!([]));
    let (one, two) = (room.file("one", 16 * MIB), room.file("two", 32 * MIB));
    let name = add_disk(&room, kind, &server, &one);
    let shown = room.devsplice(["events", "--json", &name]).limit(120).start();
    let mut heard = |kind: &str| {
        let event = follower.hear();
        assert_eq!(event["method"], "event", "{event}");
        assert_eq!(
            (&event["params"]["kind"], &event["params"]["disk"]),
            (&json!(kind), &json!(name))
        );
        event["params"]["seq"].as_u64().unwrap()
    };
    let first = heard("added");
    if kind.is_ublk() {
        for (word, event) in [("quiesce", "quiesced"), ("resume", "resumed")] {
            let _ = room.devsplice([word, &name]).ok();
            heard(event);
        }
        let _ = room.devsplice(["swap", &name, &two]).ok();
        heard("swapped");
    }
    // The command is there when it has asked; that it does says the number of clients.
    std::thread::sleep(Duration::from_millis(500));
    let _ = room.devsplice(["del", &name]).ok();
    let last = heard("removed");
    let shown = shown.finish().ok();
    let lines: Vec<Value> = shown.out.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(lines.last().unwrap()["kind"], "removed", "{}", shown.out);
    // Who comes later gets what is kept.
    let mut late = server.talk();
    late.result("events", &json!({ "since": first }));
    assert_eq!(late.hear()["params"]["last"], last);
    for seq in first + 1..=last {
        assert_eq!(late.hear()["params"]["seq"], seq);
    }
    drop((talk, follower, late));
    server.end();
    Ok(())
}
