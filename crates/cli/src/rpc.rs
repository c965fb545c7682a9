//! Answers for JSON-RPC 2.0 as it is on the wire: requests, notifications, batches, errors
//! (jsonrpc.org/specification). What the methods do is in `methods`.

use devsplice_core::{Error, ErrorKind};
use serde_json::{Map, Value, json};

use crate::hall::Hall;
use crate::methods::{self, Asked, Method};

/// Most requests of a batch.
pub const MAX_BATCH: usize = 4096;

/// The text is no JSON.
pub const PARSE: i64 = -32700;
/// It is no request.
pub const REQUEST: i64 = -32600;
/// There is no such method.
pub const METHOD: i64 = -32601;
/// The method takes no such parameters.
pub const PARAMS: i64 = -32602;
/// It was tried, and failed.
pub const FAILED: i64 = -32000;

/// What a client hears, and what is to be done when it has.
pub struct Said {
    /// A line; none where only notifications came.
    pub answer: Option<String>,
    /// What follows.
    pub after: After,
}

/// What follows an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum After {
    /// The next request.
    Nothing,
    /// Events, after the one of this number or from now on.
    Follow(Option<u64>),
    /// A look whether anything is left to serve.
    Look,
    /// The end: other processes serve all disks.
    HandedOver,
    /// The end.
    End,
}

/// Why a request has no result.
pub struct Refusal {
    code: i64,
    text: String,
    kind: Option<&'static str>,
}

impl Refusal {
    /// With one of the codes above.
    pub fn new(code: i64, text: impl Into<String>) -> Refusal {
        Refusal { code, text: text.into(), kind: None }
    }

    fn value(&self) -> Value {
        let mut error = json!({ "code": self.code, "message": self.text });
        if let Some(kind) = self.kind {
            error["data"] = json!({ "kind": kind });
        }
        error
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Refusal {
        let kind = match error.kind() {
            ErrorKind::Invalid => "invalid",
            ErrorKind::NotFound => "not-found",
            ErrorKind::Busy => "busy",
            ErrorKind::Permission => "permission",
            ErrorKind::Unsupported => "unsupported",
            ErrorKind::Timeout => "timeout",
            _ => "os",
        };
        Refusal { code: FAILED, text: error.to_string(), kind: Some(kind) }
    }
}

/// A value as a line.
pub fn line(value: &Value) -> String {
    format!("{value}\n")
}

/// A notification from the server.
pub fn note(method: &str, params: &Value) -> Value {
    json!({ "jsonrpc": "2.0", "method": method, "params": params })
}

/// The line for a client that is sent away.
pub fn refusal(text: &str) -> String {
    line(&failure(&Value::Null, &Refusal::new(REQUEST, text)))
}

fn failure(id: &Value, refusal: &Refusal) -> Value {
    json!({ "jsonrpc": "2.0", "id": id, "error": refusal.value() })
}

/// Does what a line asks for. `is_gone` is whether nobody would hear the answer.
pub fn answer(hall: &Hall, line_in: &[u8], is_gone: &dyn Fn() -> bool) -> Said {
    let bad = |code, text: String| Said {
        answer: Some(line(&failure(&Value::Null, &Refusal::new(code, text)))),
        after: After::Nothing,
    };
    if line_in.iter().all(u8::is_ascii_whitespace) {
        return Said { answer: None, after: After::Nothing };
    }
    let value: Value = match serde_json::from_slice(line_in) {
        Ok(value) => value,
        Err(error) => return bad(PARSE, format!("no JSON: {error}")),
    };
    let Value::Array(requests) = value else {
        let (answer, after) = one((hall, is_gone), &value, false);
        return Said { answer: answer.map(|answer| line(&answer)), after };
    };
    if requests.is_empty() || requests.len() > MAX_BATCH {
        return bad(REQUEST, format!("a batch is of 1 to {MAX_BATCH} requests"));
    }
    let (mut answers, mut after) = (Vec::new(), After::Nothing);
    for request in &requests {
        let (answer, then) = one((hall, is_gone), request, true);
        answers.extend(answer);
        if then != After::Nothing {
            after = then;
        }
    }
    let answer = if answers.is_empty() { None } else { Some(line(&Value::Array(answers))) };
    Said { answer, after }
}

/// Does one request. A notification is done as well, and has no answer.
fn one(
    (hall, is_gone): (&Hall, &dyn Fn() -> bool),
    request: &Value,
    in_batch: bool,
) -> (Option<Value>, After) {
    let (id, method, params) = match parse(request) {
        Ok(parts) => parts,
        // Good but for its method: one that wants no answer gets none.
        Err(refusal) if refusal.code == METHOD && !id_given(request) => {
            return (None, After::Nothing);
        }
        Err(refusal) => {
            let id = request.get("id").filter(|id| is_id(id)).unwrap_or(&Value::Null);
            return (Some(failure(id, &refusal)), After::Nothing);
        }
    };
    let done = if in_batch && method.is_last {
        Err(Refusal::new(REQUEST, format!("{} cannot be in a batch", method.name)))
    } else {
        // Who sends a notification need not stay for it.
        let is_given_up = &|| id.is_some() && is_gone();
        let asked = Asked { hall, is_given_up };
        method.check(params).and_then(|params| (method.run)(&asked, &params))
    };
    let (answer, after) = match done {
        Ok((result, after)) => (json!({ "jsonrpc": "2.0", "id": id, "result": result }), after),
        Err(refusal) => {
            let id = id.unwrap_or(&Value::Null);
            // A disk that was to go and did not may be the end of its server.
            let after = if method.may_end { After::Look } else { After::Nothing };
            return (id_given(request).then(|| failure(id, &refusal)), after);
        }
    };
    (id.map(|_| answer), after)
}

fn id_given(request: &Value) -> bool {
    request.get("id").is_some()
}

fn is_id(id: &Value) -> bool {
    matches!(id, Value::String(_) | Value::Number(_) | Value::Null)
}

type Parts<'a> = (Option<&'a Value>, &'static Method, Value);

fn parse(request: &Value) -> Result<Parts<'_>, Refusal> {
    let no_request = |text: &str| Refusal::new(REQUEST, text);
    let Value::Object(fields) = request else {
        return Err(no_request("a request is an object, or a batch of them an array"));
    };
    if fields.get("jsonrpc") != Some(&json!("2.0")) {
        return Err(no_request("a request says \"jsonrpc\": \"2.0\""));
    }
    let id = fields.get("id");
    if !id.is_none_or(is_id) {
        return Err(no_request("id is a string or a number"));
    }
    let Some(Value::String(name)) = fields.get("method") else {
        return Err(no_request("a request names a method"));
    };
    let params = match fields.get("params") {
        None => Value::Object(Map::new()),
        Some(params @ (Value::Object(_) | Value::Array(_))) => params.clone(),
        Some(_) => return Err(no_request("params is an object or an array")),
    };
    match methods::find(name) {
        Some(method) => Ok((id, method, params)),
        None => {
            let all: Vec<_> = methods::ALL.iter().map(|method| method.name).collect();
            let text = format!("method `{name}`: unknown; {}", all.join(", "));
            Err(Refusal::new(METHOD, text))
        }
    }
}
