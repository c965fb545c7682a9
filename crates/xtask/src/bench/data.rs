//! Answers for the figures: one per device, load and sample; their median and spread; as JSON.

use std::path::Path;

use serde_json::{Value, json};

use crate::Fallible;

/// One run of a load on a device.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// The device's name.
    pub device: String,
    /// The cell's name.
    pub cell: String,
    /// What was measured, in the table's unit.
    pub value: f64,
    /// Share of the run's time in which the CPU was idle, in percent.
    pub idle: f64,
}

/// All that a part of the bench has found out.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Results {
    /// The figures.
    pub samples: Vec<Sample>,
    /// Devices that were not measured, and why.
    pub absent: Vec<(String, String)>,
    /// The devices' commands.
    pub commands: Vec<(String, String)>,
    /// The bytes that went through each device of ours, and how.
    pub moved: Vec<(String, String)>,
    /// What it was measured on.
    pub conditions: Vec<(String, String)>,
}

/// The figures of one cell on one device.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Figure {
    /// The middle sample.
    pub median: f64,
    /// Distance of the outer samples, in percent of the middle one.
    pub spread: f64,
}

/// How one device compares with another, round by round.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ratio {
    /// The middle one of the rounds' ratios.
    pub median: f64,
    /// The middle of those below that.
    pub low: f64,
    /// The middle of those above it.
    pub high: f64,
}

impl Results {
    /// The figures of `cell` on `device`.
    pub fn figure(&self, device: &str, cell: &str) -> Option<Figure> {
        let is_wanted = |sample: &&Sample| sample.device == device && sample.cell == cell;
        let values = self.samples.iter().filter(is_wanted).map(|sample| sample.value);
        summary(values.collect())
    }

    /// The ratios of `device` to `base` in `cell`, each of two samples of one round: what else runs
    /// on the machine changes slower than rounds do. None if some sample is missing.
    pub fn ratio(&self, device: &str, base: &str, cell: &str) -> Option<Ratio> {
        let values = |device: &str| -> Vec<f64> {
            let is_wanted = |sample: &&Sample| sample.device == device && sample.cell == cell;
            self.samples.iter().filter(is_wanted).map(|sample| sample.value).collect()
        };
        let (ours, theirs) = (values(device), values(base));
        if ours.len() != theirs.len() {
            return None;
        }
        let mut ratios: Vec<f64> = ours.iter().zip(theirs).map(|(a, b)| a / b).collect();
        let median = summary(ratios.clone())?.median;
        ratios.sort_by(f64::total_cmp);
        // As many are left out above as below, so that a range of few is not of one side only.
        let last = ratios.len() - 1;
        Some(Ratio { median, low: ratios[last / 4], high: ratios[last - last / 4] })
    }

    /// Writes everything to a file.
    pub fn save(&self, path: &Path) -> Fallible<()> {
        let samples: Vec<Value> = self
            .samples
            .iter()
            .map(|s| json!({"device": s.device, "cell": s.cell, "value": s.value, "idle": s.idle}))
            .collect();
        let all = json!({
            "samples": samples,
            "absent": self.absent,
            "commands": self.commands,
            "moved": self.moved,
            "conditions": self.conditions,
        });
        std::fs::write(path, format!("{all:#}\n"))
            .map_err(|e| format!("cannot write {}: {e}", path.display()))
    }

    /// Reads what `save` wrote.
    pub fn load(path: &Path) -> Fallible<Self> {
        let text = std::fs::read_to_string(path)
            .map_err(|e| format!("cannot read {}: {e}", path.display()))?;
        let all: Value = serde_json::from_str(&text)
            .map_err(|e| format!("{} is no JSON: {e}", path.display()))?;
        let sample = |value: &Value| {
            Some(Sample {
                device: value["device"].as_str()?.to_owned(),
                cell: value["cell"].as_str()?.to_owned(),
                value: value["value"].as_f64()?,
                idle: value["idle"].as_f64()?,
            })
        };
        let samples = all["samples"].as_array().into_iter().flatten().filter_map(sample);
        Ok(Self {
            samples: samples.collect(),
            absent: pairs(&all["absent"]),
            commands: pairs(&all["commands"]),
            moved: pairs(&all["moved"]),
            conditions: pairs(&all["conditions"]),
        })
    }
}

/// A list of pairs of texts.
fn pairs(list: &Value) -> Vec<(String, String)> {
    let pair = |value: &Value| Some((value[0].as_str()?.to_owned(), value[1].as_str()?.to_owned()));
    list.as_array().into_iter().flatten().filter_map(pair).collect()
}

/// Median and spread of some values.
fn summary(mut values: Vec<f64>) -> Option<Figure> {
    values.sort_by(f64::total_cmp);
    let (first, last) = (*values.first()?, *values.last()?);
    let middle = values.len() / 2;
    let median = match values.len() % 2 {
        0 => f64::midpoint(values[middle - 1], values[middle]),
        _ => values[middle],
    };
    Some(Figure { median, spread: (last - first) / median * 100.0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_is_the_middle_sample_and_the_distance_of_the_outer_ones() {
        let odd = summary(vec![3.0, 2.0, 2.5]).unwrap();
        assert_eq!((odd.median, odd.spread), (2.5, 40.0));
        assert_eq!(summary(vec![1.0, 3.0]).unwrap().median, 2.0);
        assert_eq!(summary(vec![]), None);
    }

    #[test]
    fn ratios_are_those_of_samples_of_one_round() {
        let sample = |device: &str, value| {
            let (device, cell) = (device.to_owned(), "c".to_owned());
            Sample { device, cell, value, idle: 0.0 }
        };
        let mut results = Results::default();
        // The machine slows down from round to round; the ratio stays.
        for (a, b) in [(20.0, 10.0), (10.0, 5.0), (5.0, 2.0), (3.0, 1.5), (1.0, 1.0)] {
            results.samples.extend([sample("a", a), sample("b", b)]);
        }
        let ratio = results.ratio("a", "b", "c");
        assert_eq!(ratio, Some(Ratio { median: 2.0, low: 2.0, high: 2.0 }));
        for (device, value) in
            [("p", 3.0), ("q", 1.0), ("p", 1.0), ("q", 1.0), ("p", 2.0), ("q", 1.0)]
        {
            results.samples.push(sample(device, value));
        }
        let ratio = results.ratio("p", "q", "c");
        assert_eq!(ratio, Some(Ratio { median: 2.0, low: 1.0, high: 3.0 }), "both sides of three");
        results.samples.push(sample("a", 1.0));
        assert_eq!(results.ratio("a", "b", "c"), None, "whose round was it?");
    }

    #[test]
    fn what_is_saved_can_be_loaded() {
        let pair = || vec![("a".to_owned(), "b".to_owned())];
        let sample = Sample { device: "d".into(), cell: "c".into(), value: 1.5, idle: 0.0 };
        let [absent, commands, moved, conditions] = [pair(), pair(), pair(), pair()];
        let results = Results { samples: vec![sample], absent, commands, moved, conditions };
        let path = std::env::temp_dir().join(format!("devsplice-bench.{}", std::process::id()));
        results.save(&path).unwrap();
        let loaded = Results::load(&path);
        std::fs::remove_file(&path).unwrap();
        assert_eq!(loaded, Ok(results));
    }
}
