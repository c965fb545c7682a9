//! Answers for a plan: which driver stands where, with checked arguments, lower devices first.

use std::collections::HashSet;
use std::io::Read;
use std::path::Path;

use devsplice_core::stack::{MAX_DEPTH, MAX_NODES, MAX_PORTS};
use devsplice_core::{Args, Arity, Error, ErrorKind, Result};

use crate::{Catalog, Kind, MAX_FILE, MAX_TEXT, devices, expr, files, show};

/// One driver of a stack.
#[derive(Clone, Debug)]
pub struct Place {
    /// What messages call it: its name in a TOML file, else the driver's, with `#2` for a second.
    pub label: String,
    /// What stands here.
    pub kind: Kind,
    /// Its arguments, checked against its keys.
    pub args: Args,
    /// Its lower devices, as indexes into [`Plan::places`], in the order of the ports.
    pub below: Vec<usize>,
    /// The arguments as typed: the main key first, then in the order of the driver's keys.
    pub given: Vec<(String, String)>,
}

/// A stack before anything of it is opened.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Lower devices before those above them.
    pub places: Vec<Place>,
    /// The top.
    pub root: usize,
}

impl Plan {
    /// Reads an expression such as `linear(/a.img, offset=1M)`.
    ///
    /// # Errors
    /// Where the text goes wrong, or which rule the stack breaks.
    pub fn parse(text: &str, catalog: &Catalog) -> Result<Plan> {
        let mut draft = Draft::new(catalog);
        let root = expr::parse(text, &mut draft)?;
        draft.finish(root)
    }

    /// Reads a TOML document with named devices.
    ///
    /// # Errors
    /// Which device or key is wrong, or which rule the stack breaks.
    pub fn parse_toml(text: &str, catalog: &Catalog) -> Result<Plan> {
        let mut draft = Draft::new(catalog);
        let root = devices::parse(text, &mut draft)?;
        draft.finish(root)
    }

    /// What a command line names: a path that ends in `.toml` is a file to read, all else is an
    /// expression. Paths inside the file are relative to the current directory, as everywhere.
    ///
    /// # Errors
    /// As the two others; and if the file cannot be read.
    pub fn load(arg: &str, catalog: &Catalog) -> Result<Plan> {
        let is_word = !arg.contains(['(', ')', ',', ':', '"']);
        if !arg.ends_with(".toml") || !(is_word || Path::new(arg).is_file()) {
            return Plan::parse(arg, catalog);
        }
        let file = std::fs::File::open(arg).map_err(|error| Error::os(arg, &error))?;
        let mut text = String::new();
        let most = MAX_FILE as u64 + 1;
        file.take(most).read_to_string(&mut text).map_err(|error| Error::os(arg, &error))?;
        Plan::parse_toml(&text, catalog).map_err(|error| error.within(arg))
    }

    /// The same stack with the paths of its files seen from the root, given that they were typed in
    /// `dir`: it means the same to a process elsewhere, later.
    ///
    /// # Errors
    /// If a path so becomes one that its driver does not take.
    pub fn anchored(mut self, dir: &Path) -> Result<Plan> {
        for place in &mut self.places {
            let Kind::Source(source) = place.kind else { continue };
            let Some(anchored) = source.anchored else { continue };
            for (key, value) in &mut place.given {
                if source.main_key == Some(key) {
                    *value = anchored(value, dir);
                }
            }
            place.args = Args::new(source.name, source.keys, &place.given)?;
        }
        Ok(self)
    }

    /// What messages and commands call the places, in their order; [`Plan::labelled`] takes it.
    #[must_use]
    pub fn labels(&self) -> Vec<String> {
        self.places.iter().map(|place| place.label.clone()).collect()
    }

    /// The plan with other labels, as far as they are as many as it has places.
    #[must_use]
    pub fn labelled(mut self, labels: &[String]) -> Plan {
        if labels.len() == self.places.len() {
            for (place, label) in self.places.iter_mut().zip(labels) {
                place.label.clone_from(label);
            }
        }
        self
    }

    /// The same stack as one line, in the one form that equal stacks share. Names are lost.
    #[must_use]
    pub fn to_expression(&self) -> String {
        show::expression(self)
    }
}

/// A plan that is being put together, from the bottom up.
pub(crate) struct Draft<'c> {
    pub(crate) catalog: &'c Catalog,
    places: Vec<Place>,
    /// Of each place: layers from there to the deepest bottom.
    depths: Vec<usize>,
}

impl<'c> Draft<'c> {
    fn new(catalog: &'c Catalog) -> Draft<'c> {
        Draft { catalog, places: Vec::new(), depths: Vec::new() }
    }

    /// Adds a driver over places that were added before. An empty label is filled in at the end.
    pub(crate) fn place(
        &mut self,
        label: &str,
        kind: Kind,
        mut given: Vec<(String, String)>,
        below: Vec<usize>,
    ) -> Result<usize> {
        let name = kind.name();
        let args = Args::new(name, kind.keys(), &given)?;
        arity(kind, below.len())?;
        let under = below.iter().map(|&place| self.depths[place]).max().unwrap_or(0);
        let depth = under + usize::from(matches!(kind, Kind::Layer(_)));
        if depth > MAX_DEPTH {
            let reason = format!("more than {MAX_DEPTH} layers above one another");
            return Err(Error::invalid(name, reason));
        }
        if self.places.len() == MAX_NODES {
            return Err(Error::invalid(name, format!("more than {MAX_NODES} devices in a stack")));
        }
        given.sort_by_key(|(key, _)| {
            let place = kind.keys().iter().position(|one| one.name == key);
            (kind.main_key() != Some(key), place)
        });
        self.places.push(Place { label: label.to_owned(), kind, args, below, given });
        self.depths.push(depth);
        Ok(self.places.len() - 1)
    }

    fn finish(mut self, root: usize) -> Result<Plan> {
        name_all(&mut self.places);
        files::used_once(&self.places)?;
        Ok(Plan { places: self.places, root })
    }
}

/// Checks how many devices lie below.
fn arity(kind: Kind, count: usize) -> Result<()> {
    let reason = match kind.below() {
        Arity::None if count > 0 => "lies over nothing",
        Arity::One if count != 1 => "lies over exactly one device",
        Arity::Many if count == 0 => "lies over one device or more",
        Arity::Many if count > MAX_PORTS => "lies over at most 4000 devices",
        _ => return Ok(()),
    };
    let reason = format!("{reason}, {count} given");
    Err(Error::new(ErrorKind::Invalid, kind.name(), reason).next(show::usage(kind)))
}

/// Gives a label to each place that has none: the driver's name, numbered from the second on.
fn name_all(places: &mut [Place]) {
    let mut taken: HashSet<String> = places.iter().map(|place| place.label.clone()).collect();
    let mut next = std::collections::HashMap::new();
    for place in places.iter_mut().filter(|place| place.label.is_empty()) {
        let name = place.kind.name();
        let number = next.entry(name).or_insert(0_usize);
        loop {
            *number += 1;
            let label = if *number == 1 { name.to_owned() } else { format!("{name}#{number}") };
            if taken.insert(label.clone()) {
                place.label = label;
                break;
            }
        }
    }
}

/// Refuses a text that is too long to be meant.
pub(crate) fn bounded(text: &str, most: usize) -> Result<()> {
    if text.len() <= most {
        return Ok(());
    }
    let reason = format!("{} bytes, the most is {most}", text.len());
    let next = "write large stacks as a TOML file";
    Err(Error::invalid("stack", reason).next(if most == MAX_TEXT { next } else { "split it" }))
}
