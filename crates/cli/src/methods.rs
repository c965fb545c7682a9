//! Answers for what can be asked of a server over its control socket: each method with its
//! parameters and its result, in one table that `schema` shows and requests are held to.

use std::sync::LazyLock;

use clap::CommandFactory;
use devsplice_core::{Error, ErrorKind};
use devsplice_spec::Plan;
use serde_json::{Map, Value, json};

use crate::args::{Add, Options};
use crate::assemble::CATALOG;
use crate::hall::Hall;
use crate::hosted::Hosted;
use crate::rpc::{After, PARAMS, Refusal};
use crate::{config, events, tell};

/// What a parameter is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Type {
    /// A string.
    Text,
    /// A boolean.
    Flag,
    /// A whole number, not below zero.
    Number,
    /// An array of strings.
    Texts,
}

impl Type {
    /// As JSON Schema says it.
    fn schema(self) -> Value {
        match self {
            Type::Text => json!({ "type": "string" }),
            Type::Flag => json!({ "type": "boolean" }),
            Type::Number => json!({ "type": "integer", "minimum": 0 }),
            Type::Texts => json!({ "type": "array", "items": { "type": "string" } }),
        }
    }

    fn fits(self, value: &Value) -> bool {
        match self {
            Type::Text => value.is_string(),
            Type::Flag => value.is_boolean(),
            Type::Number => value.is_u64(),
            Type::Texts => value.as_array().is_some_and(|all| all.iter().all(Value::is_string)),
        }
    }
}

/// A parameter.
#[derive(Clone, Debug)]
pub struct Param {
    /// Its name.
    pub name: String,
    is: Type,
    is_needed: bool,
    about: String,
}

/// What is asked for, with who asks.
pub struct Asked<'a> {
    /// The disks that it is about.
    pub hall: &'a Hall,
    /// Whether nobody waits for the answer any more.
    pub is_given_up: &'a dyn Fn() -> bool,
}

impl Asked<'_> {
    /// Whether to begin with what may have waited for its turn. Who has given it up meanwhile has
    /// been told that it is not done, and may have done something else since.
    ///
    /// # Errors
    /// If nobody waits for it any more.
    fn is_wanted(&self, thing: &str) -> Result<(), Error> {
        if (self.is_given_up)() {
            let reason = "whoever asked for this has gone before it could begin: not done";
            return Err(Error::new(ErrorKind::Busy, thing, reason));
        }
        Ok(())
    }

    /// Does something with a disk when nobody else does, if it is still wanted then.
    fn change<T>(
        &self,
        name: Option<&str>,
        work: impl FnOnce(&mut Hosted) -> Result<T, Error>,
    ) -> Result<T, Error> {
        self.hall.with(name, |hosted| {
            self.is_wanted(&hosted.thing())?;
            work(hosted)
        })
    }
}

/// What a method does: its result, and what follows.
type Run = fn(&Asked<'_>, &Value) -> Result<(Value, After), Refusal>;

/// Something that can be asked for.
pub struct Method {
    /// Its name.
    pub name: &'static str,
    about: &'static str,
    /// By name, or in this order.
    pub params: Vec<Param>,
    /// The result's type, as JSON Schema says it, and what it is.
    result: (&'static str, &'static str),
    /// Whether nothing can be asked for behind it.
    pub is_last: bool,
    /// Whether the server may end by it.
    pub may_end: bool,
    /// Does it.
    pub run: Run,
}

/// All methods.
pub static ALL: LazyLock<Vec<Method>> = LazyLock::new(all);

/// The method of that name.
pub fn find(name: &str) -> Option<&'static Method> {
    ALL.iter().find(|method| method.name == name)
}

fn param(name: &str, is: Type, is_needed: bool, about: &str) -> Param {
    Param { name: name.to_owned(), is, is_needed, about: about.to_owned() }
}

fn disk() -> Param {
    param("disk", Type::Text, false, "its name; need not be said where there is but one")
}

fn method(
    (name, about): (&'static str, &'static str),
    params: Vec<Param>,
    result: (&'static str, &'static str),
    run: Run,
) -> Method {
    Method { name, about, params, result, is_last: false, may_end: false, run }
}

fn shrink() -> Param {
    param("shrink", Type::Flag, false, "even if it becomes smaller")
}

fn force() -> Param {
    param("force", Type::Flag, false, "whoever uses it")
}

/// What a method says of what it did.
const TEXT: (&str, &str) = ("string", "what was done");

fn all() -> Vec<Method> {
    let mut all = of_disks();
    all.extend(of_one_disk());
    all.extend(of_servers());
    for method in &mut all {
        method.is_last = matches!(method.name, "events" | "hand-over" | "shutdown");
        method.may_end = matches!(method.name, "del" | "stop");
    }
    all
}

/// What is about disks as a whole.
fn of_disks() -> Vec<Method> {
    let stopped = ("string", "`stopped`");
    let config = || param("config", Type::Text, true, "TOML, as `save` gives it");
    vec![
        method(
            ("list", "All disks of this server."),
            vec![],
            ("array", "as `devsplice list --json`"),
            list,
        ),
        method(
            ("add", "Makes a disk; for a server of many."),
            add_params(),
            ("object", "the disk"),
            add,
        ),
        method(("del", "Removes a disk."), vec![disk(), force()], stopped, del),
        method(("stop", "The same as `del`."), vec![disk(), force()], stopped, del),
        method(
            ("recover", "Serves a disk again that has lost its server; for a server of many."),
            vec![param("disk", Type::Text, true, "its name")],
            ("object", "the disk"),
            recover,
        ),
        method(("save", "All disks as a configuration."), vec![], ("string", "TOML"), save),
        method(
            ("load", "Makes the disks of a configuration; for a server of many."),
            vec![config()],
            ("array", "an object for each disk: its name, and `device` or `error`"),
            load,
        ),
    ]
}

/// What is done to a disk that stays.
fn of_one_disk() -> Vec<Method> {
    let words = |name, is, about| param(name, is, true, about);
    vec![
        method(
            ("info", "What a disk is and has done."),
            vec![disk()],
            ("object", "as `devsplice info --json`"),
            info,
        ),
        method(("quiesce", "Has the kernel hold a disk's requests."), vec![disk()], TEXT, quiesce),
        method(("resume", "Goes on with it."), vec![disk()], TEXT, resume),
        method(
            ("swap", "Goes on with another stack."),
            vec![
                disk(),
                words("stack", Type::Text, "an expression"),
                param("labels", Type::Texts, false, "what its places are called"),
                shrink(),
            ],
            TEXT,
            swap,
        ),
        method(
            ("resize", "Tells a disk's users of its stack's size."),
            vec![disk(), shrink()],
            TEXT,
            resize,
        ),
        method(
            ("tell", "Has a layer do something."),
            vec![
                disk(),
                words("layer", Type::Text, "its label"),
                words("words", Type::Texts, "what it is to do"),
            ],
            ("string", "the layer's answer"),
            tell,
        ),
    ]
}

/// What is about the server.
fn of_servers() -> Vec<Method> {
    vec![
        method(
            ("events", "Sends what happens from now on, as notifications."),
            vec![param("since", Type::Number, false, "first, what is kept of what came after it")],
            ("string", "`following`"),
            follow,
        ),
        method(
            ("schema", "What can be asked for, and how."),
            vec![],
            ("object", "the methods and the kinds of events"),
            |_, _| Ok((schema(), After::Nothing)),
        ),
        method(
            ("hand-over", "Leaves all disks to another program, and ends."),
            vec![param("disk", Type::Text, false, "one of them, of no importance")],
            ("string", "`handed over`"),
            hand_over,
        ),
        method(
            ("shutdown", "Removes all disks, and ends."),
            vec![force()],
            ("string", "`stopped`"),
            shutdown,
        ),
    ]
}

/// The parameters of `add` are the options of `devsplice add`.
fn add_params() -> Vec<Param> {
    let mut params = vec![
        param("stack", Type::Text, true, "an expression"),
        param("labels", Type::Texts, false, "what its places are called"),
    ];
    let command = Options::command();
    let Some(add) = command.find_subcommand("add") else { return params };
    for option in add.get_arguments().filter(|option| option.get_id() != "stack") {
        let name = option.get_id().as_str();
        let Some(default) = Add::plain().get(name) else { continue };
        let is = match (default, name) {
            (Value::Bool(_), _) => Type::Flag,
            (Value::Array(_), _) => Type::Texts,
            (Value::Number(_), _) | (Value::Null, "id" | "queues" | "threads") => Type::Number,
            _ => Type::Text,
        };
        let help = option.get_help().map(ToString::to_string).unwrap_or_default();
        params.push(param(name, is, false, &help));
    }
    params
}

impl Method {
    /// The parameters by name, if they are such as this method takes.
    ///
    /// # Errors
    /// Which one is not.
    pub fn check(&self, params: Value) -> Result<Value, Refusal> {
        let refuse = |text: String| Err(Refusal::new(PARAMS, format!("{}: {text}", self.name)));
        let given: Map<String, Value> = match params {
            Value::Object(given) => given,
            Value::Array(values) if values.len() > self.params.len() => {
                return refuse(format!("takes {} parameters at most", self.params.len()));
            }
            Value::Array(values) => {
                self.params.iter().map(|param| param.name.clone()).zip(values).collect()
            }
            _ => return refuse("params is an object or an array".to_owned()),
        };
        for (name, value) in &given {
            let Some(param) = self.params.iter().find(|param| param.name == *name) else {
                let all: Vec<_> = self.params.iter().map(|param| param.name.as_str()).collect();
                return refuse(format!("no parameter `{name}`; it takes: {}", all.join(", ")));
            };
            if !param.is.fits(value) {
                return refuse(format!("`{name}` is to be {}", param.is.schema()));
            }
        }
        let lacks = |param: &&Param| param.is_needed && !given.contains_key(&param.name);
        match self.params.iter().find(lacks) {
            Some(param) => refuse(format!("`{}` is missing", param.name)),
            None => Ok(Value::Object(given)),
        }
    }

    fn schema(&self) -> Value {
        let mut properties = Map::new();
        for Param { name, is, about, .. } in &self.params {
            let mut schema = is.schema();
            schema["description"] = json!(about);
            properties.insert(name.clone(), schema);
        }
        let needed = self.params.iter().filter(|param| param.is_needed);
        let needed: Vec<_> = needed.map(|param| param.name.as_str()).collect();
        let (is, what) = self.result;
        json!({
            "description": self.about,
            "params": {
                "type": "object",
                "properties": properties,
                "required": needed,
                "additionalProperties": false,
            },
            "result": { "type": is, "description": what },
        })
    }
}

fn schema() -> Value {
    let methods: Map<String, Value> =
        ALL.iter().map(|method| (method.name.to_owned(), method.schema())).collect();
    let kinds: Map<String, Value> =
        events::KINDS.iter().map(|(kind, about)| ((*kind).to_owned(), json!(about))).collect();
    json!({ "methods": methods, "events": kinds })
}

fn name(params: &Value) -> Option<&str> {
    params["disk"].as_str()
}

fn flag(params: &Value, name: &str) -> bool {
    params[name].as_bool().unwrap_or(false)
}

fn words(params: &Value, name: &str) -> Vec<String> {
    serde_json::from_value(params[name].clone()).unwrap_or_default()
}

type Done = Result<(Value, After), Refusal>;

fn done(text: impl Into<String>) -> Done {
    Ok((Value::String(text.into()), After::Nothing))
}

fn info(asked: &Asked<'_>, params: &Value) -> Done {
    Ok((asked.hall.with(name(params), |hosted| Ok(hosted.info()))?, After::Nothing))
}

fn list(asked: &Asked<'_>, _: &Value) -> Done {
    Ok((asked.hall.list(), After::Nothing))
}

fn add(asked: &Asked<'_>, params: &Value) -> Done {
    let mut fields = params.clone();
    let labels = words(params, "labels");
    if let Some(fields) = fields.as_object_mut() {
        fields.remove("labels");
    }
    let add = Add::with(fields).map_err(|error| Refusal::new(PARAMS, error.to_string()))?;
    let plan = Plan::parse(&add.stack, &CATALOG)?.labelled(&labels);
    let disk = asked.hall.add(&add, &plan)?;
    Ok((serde_json::to_value(disk).unwrap_or_default(), After::Nothing))
}

fn del(asked: &Asked<'_>, params: &Value) -> Done {
    asked.hall.remove(name(params), flag(params, "force"), &|thing| asked.is_wanted(thing))?;
    Ok((json!("stopped"), After::Look))
}

fn recover(asked: &Asked<'_>, params: &Value) -> Done {
    let disk = asked.hall.recover(name(params).unwrap_or_default(), "restarted")?;
    Ok((serde_json::to_value(disk).unwrap_or_default(), After::Nothing))
}

fn quiesce(asked: &Asked<'_>, params: &Value) -> Done {
    done(asked.change(name(params), |hosted| hosted.quiesce())?)
}

fn resume(asked: &Asked<'_>, params: &Value) -> Done {
    done(asked.change(name(params), |hosted| hosted.resume())?)
}

fn swap(asked: &Asked<'_>, params: &Value) -> Done {
    let stack = params["stack"].as_str().unwrap_or_default();
    let (labels, shrink) = (words(params, "labels"), flag(params, "shrink"));
    done(asked.change(name(params), |hosted| hosted.swap(stack, &labels, shrink))?)
}

fn resize(asked: &Asked<'_>, params: &Value) -> Done {
    let shrink = flag(params, "shrink");
    done(asked.change(name(params), |hosted| hosted.resize(shrink))?)
}

/// A layer may take its time: the disk is not kept from others meanwhile.
fn tell(asked: &Asked<'_>, params: &Value) -> Done {
    let served = asked.change(name(params), |hosted| {
        hosted.served().ok_or_else(|| Error::invalid(hosted.thing(), "is quiesced"))
    })?;
    let layer = params["layer"].as_str().unwrap_or_default();
    done(tell::answer(&served, layer, words(params, "words"))?)
}

fn save(asked: &Asked<'_>, _: &Value) -> Done {
    done(config::save(&asked.hall.disks())?)
}

fn load(asked: &Asked<'_>, params: &Value) -> Done {
    let text = params["config"].as_str().unwrap_or_default();
    let wanted = config::parse(text)?;
    let report = wanted.into_iter().map(|one| match asked.hall.add(&one.add, &one.plan) {
        Ok(disk) => json!({ "name": disk.name, "device": disk.device }),
        Err(error) => json!({ "name": one.add.name, "error": error.to_string() }),
    });
    Ok((report.collect(), After::Nothing))
}

fn follow(_: &Asked<'_>, params: &Value) -> Done {
    Ok((json!("following"), After::Follow(params["since"].as_u64())))
}

fn hand_over(asked: &Asked<'_>, _: &Value) -> Done {
    asked.hall.hand_over(&|| asked.is_wanted("hand-over"))?;
    Ok((json!("handed over"), After::HandedOver))
}

fn shutdown(asked: &Asked<'_>, params: &Value) -> Done {
    let left = asked.hall.clear(flag(params, "force"));
    if left.is_empty() {
        return Ok((json!("stopped"), After::End));
    }
    let why: Vec<_> = left.iter().map(ToString::to_string).collect();
    Err(Refusal::from(Error::new(ErrorKind::Busy, "not removed", why.join("; "))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_names_every_method_parameter_and_kind_of_event() {
        let page = include_str!("../../../docs/rpc.md");
        for method in ALL.iter() {
            let name = format!("`{}`", method.name);
            let row = page.lines().find(|line| line.starts_with('|') && line.contains(&name));
            let row = row.unwrap_or_else(|| panic!("no row for {name}"));
            // Those of `add` are on the page of its options.
            let own = method.params.iter().take(if method.name == "add" { 2 } else { 9 });
            for param in own {
                assert!(row.contains(&format!("`{}`", param.name)), "{}: {row}", param.name);
            }
        }
        for (kind, _) in events::KINDS {
            assert!(page.contains(&format!("`{kind}`")), "{kind}");
        }
    }

    #[test]
    fn the_options_of_add_are_its_parameters() {
        let add = find("add").unwrap();
        for name in Add::plain().as_object().unwrap().keys() {
            assert!(add.params.iter().any(|param| param.name == *name), "{name}");
        }
        let refused = add.check(json!({ "stack": "null(size=1M)", "depth": "deep" }));
        assert!(refused.is_err());
        let listen = ["unix:/run/a", "tcp:[::1]"];
        let fields = json!({ "stack": "null(size=1M)", "depth": 9, "queues": 2, "listen": listen });
        let made = Add::with(add.check(fields).unwrap_or_default()).unwrap();
        assert_eq!(made.listen, listen);
        assert_eq!((made.depth, made.queues, made.threads), (9, Some(2), None));
        assert_eq!(made.changed()["queues"], 2);
    }
}
