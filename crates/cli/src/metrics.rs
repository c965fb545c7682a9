//! Answers for `devsplice metrics`: what all disks here are and have counted, as Prometheus reads
//! it (OpenMetrics 1.0), printed, written to a file, or given to whoever asks over HTTP.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use devsplice_core::{Error, Result};
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use serde_json::{Value, json};

use crate::args::Metrics;
use crate::{client, list, say, state};

/// How long a server may take to say what it has counted.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long who asks over HTTP may take to do so, and to take the answer.
const CLIENT_PATIENCE: Duration = Duration::from_secs(5);
/// Most bytes of a request over HTTP.
const MAX_REQUEST: u64 = 8 << 10;
/// What the text is.
const TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Prints, writes or serves them.
///
/// # Errors
/// If the state cannot be read, the file not be written, or the address not be had.
pub fn run(metrics: &Metrics) -> Result<()> {
    if let Some(address) = &metrics.listen {
        return listen(address);
    }
    let text = text(&disks()?);
    match &metrics.textfile {
        Some(path) => replace(path, &text),
        None => {
            let _ = std::io::stdout().write_all(text.as_bytes());
            Ok(())
        }
    }
}

/// Every disk with all that `info` knows of it. One whose server does not answer has the state
/// `silent`.
///
/// # Errors
/// If the state cannot be read.
pub fn disks() -> Result<Vec<Value>> {
    let each = state::all()?.into_iter().map(|found| {
        let mut shown = found.disk.shown();
        shown["state"] = json!(list::word(&found));
        if !found.alive {
            return shown;
        }
        client::call(&found.disk.name, "info", &json!({}), PATIENCE).unwrap_or_else(|_| {
            shown["state"] = json!("silent");
            shown
        })
    });
    Ok(each.collect())
}

/// Every state that a disk can be in.
const STATES: [&str; 6] = ["live", "quiesced", "ending", "waiting", "dead", "silent"];
/// Counters of `info` that are metrics by themselves: key, name, help.
const COUNTERS: &[(&str, &str, &str)] = &[
    ("errors", "request_errors", "Requests that ended with an error"),
    ("pieces", "pieces", "Pieces that requests were routed into"),
    ("splices", "splices", "Splices that pieces were gathered into"),
    ("retries", "retries", "Splices sent again after short results or transient errors"),
    ("misses", "misses", "Times that a request waited for a layer to learn something"),
    ("stuck", "stuck_requests", "Requests that were reported as stuck below"),
    ("sqes", "ring_entries", "Submission queue entries"),
    ("enters", "ring_enters", "Calls into the kernel"),
    ("bytes_spliced", "spliced_bytes", "Payload moved without being in the server's memory"),
    ("bytes_copied", "copied_bytes", "Payload copied into or out of the server's memory"),
    ("bytes_meta", "metadata_bytes", "Bytes that layers moved for themselves"),
];
/// Requests by what they ask for: key, label.
const OPS: [(&str, &str); 4] =
    [("reads", "read"), ("writes", "write"), ("flushes", "flush"), ("discards", "discard")];
/// Latencies of a row of `info`: key, label.
const QUANTILES: [(&str, &str); 5] = [
    ("p50_ns", "0.5"),
    ("p90_ns", "0.9"),
    ("p99_ns", "0.99"),
    ("p99.9_ns", "0.999"),
    ("max_ns", "1"),
];

type Labels = Vec<(String, String)>;
type Counters = Family<Labels, Counter>;
type Gauges = Family<Labels, Gauge<f64, AtomicU64>>;

fn labels(all: &[(&str, &Value)]) -> Labels {
    // The library writes a value as it gets it; the format wants these three escaped.
    let escaped = |text: &str| text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    let text = |value: &Value| match value {
        Value::Null => String::new(),
        Value::String(text) => escaped(text),
        other => other.to_string(),
    };
    all.iter().map(|(name, value)| ((*name).to_owned(), text(value))).collect()
}

#[allow(clippy::cast_precision_loss)] // A gauge is a float; 2^53 bytes are 8 PiB.
fn number(value: &Value) -> f64 {
    value.as_u64().unwrap_or(0) as f64
}

/// The text of all of these.
pub fn text(disks: &[Value]) -> String {
    let mut registry = Registry::with_prefix("devsplice");
    about(&mut registry, disks);
    let requests = Counters::default();
    registry.register("requests", "Requests finished", requests.clone());
    for (disk, (key, op)) in disks.iter().flat_map(|disk| OPS.map(|op| (disk, op))) {
        if let Some(count) = disk["counts"][key].as_u64() {
            let labels = labels(&[("disk", &disk["name"]), ("op", &json!(op))]);
            requests.get_or_create(&labels).inc_by(count);
        }
    }
    for (key, name, help) in COUNTERS {
        let counters = Counters::default();
        registry.register(*name, *help, counters.clone());
        for disk in disks {
            if let Some(count) = disk["counts"][*key].as_u64() {
                counters.get_or_create(&labels(&[("disk", &disk["name"])])).inc_by(count);
            }
        }
    }
    latencies(&mut registry, disks);
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = encode(&mut text, &registry);
    text
}

/// What the disks are.
fn about(registry: &mut Registry, disks: &[Value]) {
    let gauges = |registry: &mut Registry, name: &str, help: &str| {
        let gauges = Gauges::default();
        registry.register(name, help, gauges.clone());
        gauges
    };
    let info = gauges(registry, "disk_info", "What a disk is; always 1");
    let states = gauges(registry, "disk_state", "1 for the state that a disk is in");
    let size = gauges(registry, "size_bytes", "Size of the disk");
    let started = gauges(registry, "start_time_seconds", "When its server started, since 1970");
    let threads = gauges(registry, "io_threads", "I/O threads that serve it");
    for disk in disks {
        let keys = ["device", "export", "data_path", "recovery", "stack"];
        let mut all = vec![("disk", &disk["name"])];
        all.extend(keys.map(|key| (key, &disk[key])));
        info.get_or_create(&labels(&all)).set(1.0);
        let own = labels(&[("disk", &disk["name"])]);
        for state in STATES {
            let labels = labels(&[("disk", &disk["name"]), ("state", &json!(state))]);
            states.get_or_create(&labels).set(f64::from(u8::from(disk["state"] == state)));
        }
        size.get_or_create(&own).set(number(&disk["size"]));
        started.get_or_create(&own).set(number(&disk["started_ms"]) / 1000.0);
        if disk["threads"].is_u64() {
            threads.get_or_create(&own).set(number(&disk["threads"]));
        }
    }
}

/// What layers have measured: `stats`, and all of them with `add --latency`.
fn latencies(registry: &mut Registry, disks: &[Value]) {
    let (counts, times) = (Counters::default(), Gauges::default());
    let help = "Splices below a layer, by operation and size";
    registry.register("layer_operations", help, counts.clone());
    let help = "Latencies that this part of them stayed below";
    registry.register("layer_latency_seconds", help, times.clone());
    for disk in disks {
        for layer in disk["layers"].as_array().into_iter().flatten() {
            for row in layer["status"]["latencies"].as_array().into_iter().flatten() {
                let mut own = labels(&[("disk", &disk["name"]), ("layer", &layer["layer"])]);
                own.extend(labels(&[("op", &row["op"]), ("size", &row["size"])]));
                counts.get_or_create(&own).inc_by(row["count"].as_u64().unwrap_or(0));
                for (key, quantile) in QUANTILES {
                    let mut own = own.clone();
                    own.extend(labels(&[("quantile", &json!(quantile))]));
                    times.get_or_create(&own).set(number(&row[key]) / 1e9);
                }
            }
        }
    }
}

/// Writes a file whole or not at all: whoever reads it meanwhile gets the old one.
fn replace(path: &Path, text: &str) -> Result<()> {
    let os = |error| Error::os(path.display().to_string(), &error);
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let other = path.with_file_name(name);
    let done = std::fs::write(&other, text).and_then(|()| std::fs::rename(&other, path));
    if done.is_err() {
        let _ = std::fs::remove_file(&other);
    }
    done.map_err(os)
}

/// Serves them until the process is ended, one client at a time.
fn listen(address: &str) -> Result<()> {
    let os = |error| Error::os(address, &error);
    let listener = TcpListener::bind(address).map_err(os)?;
    say!("http://{}/metrics", listener.local_addr().map_err(os)?);
    for client in listener.incoming().flatten() {
        // A client that goes away is none of the next one's business.
        let _ = serve(&client);
    }
    Ok(())
}

fn serve(mut client: &TcpStream) -> std::io::Result<()> {
    client.set_read_timeout(Some(CLIENT_PATIENCE))?;
    client.set_write_timeout(Some(CLIENT_PATIENCE))?;
    let mut lines = BufReader::new(client.take(MAX_REQUEST)).lines();
    let request = lines.next().transpose()?.unwrap_or_default();
    // The rest of the request, up to an empty line: an answer before its end may get lost.
    for line in lines {
        if line?.is_empty() {
            break;
        }
    }
    let (status, text) = match answer(&request) {
        Some(Ok(disks)) => ("200 OK", text(&disks)),
        Some(Err(error)) => ("500 Internal Server Error", format!("{error}\n")),
        None => ("404 Not Found", "there is /metrics\n".to_owned()),
    };
    let kind = if status.starts_with("200") { TYPE } else { "text/plain" };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n",
        text.len()
    );
    client.write_all((head + &text).as_bytes())
}

fn answer(request: &str) -> Option<Result<Vec<Value>>> {
    let mut words = request.split_whitespace();
    let (method, path) = (words.next()?, words.next()?);
    let path = path.split('?').next()?;
    (method == "GET" && matches!(path, "/" | "/metrics")).then(disks)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk() -> Value {
        let row = json!({ "op": "read", "size": "4k", "count": 9, "p50_ns": 1500, "p90_ns": 2000,
            "p99_ns": 3000, "p99.9_ns": 4000, "max_ns": 5_000_000 });
        json!({
            "name": "home", "device": "/dev/ublkb0", "state": "live", "size": 1 << 20,
            "export": "ublk", "data_path": "register", "recovery": "reissue", "threads": 2,
            "stack": "file(\"/a \\ b\")", "started_ms": 1500,
            "counts": { "reads": 3, "writes": 4, "flushes": 0, "discards": 1, "errors": 2,
                "bytes_spliced": 4096, "stuck": 0 },
            "layers": [{ "layer": "stats", "status": { "latencies": [row] } }],
        })
    }

    #[test]
    fn every_value_is_a_line_with_its_disk() {
        let text = text(&[disk(), json!({ "name": "gone", "state": "dead", "size": 5 })]);
        for line in [
            "# TYPE devsplice_requests counter",
            "devsplice_requests_total{disk=\"home\",op=\"write\"} 4",
            "devsplice_request_errors_total{disk=\"home\"} 2",
            "devsplice_spliced_bytes_total{disk=\"home\"} 4096",
            "devsplice_disk_state{disk=\"home\",state=\"live\"} 1.0",
            "devsplice_disk_state{disk=\"gone\",state=\"live\"} 0.0",
            "devsplice_disk_state{disk=\"gone\",state=\"dead\"} 1.0",
            "devsplice_size_bytes{disk=\"home\"} 1048576.0",
            "devsplice_start_time_seconds{disk=\"home\"} 1.5",
            "devsplice_layer_operations_total{disk=\"home\",layer=\"stats\",op=\"read\",\
             size=\"4k\"} 9",
        ] {
            assert!(text.lines().any(|one| one == line), "{line}\nis not in\n{text}");
        }
        assert!(text.contains("quantile=\"0.99\"} 3e-6") || text.contains("\"0.99\"} 0.000003"));
        assert!(text.contains(r#"stack="file(\"/a \\ b\")""#), "{text}");
        assert!(!text.contains("requests_total{disk=\"gone\"") && text.ends_with("# EOF\n"));
    }

    #[test]
    fn every_counter_of_a_server_is_a_metric() {
        let all = devsplice_engine::Counts::default().list();
        for (name, _) in all {
            let is_known = COUNTERS.iter().any(|(key, ..)| *key == name)
                || OPS.iter().any(|(key, _)| *key == name)
                || name == "requests";
            assert!(is_known, "{name} is no metric: add it to COUNTERS and docs/operations.md");
        }
    }

    #[test]
    fn only_what_is_there_can_be_asked_for() {
        for no in ["", "GET", "POST /metrics HTTP/1.1", "GET /other HTTP/1.1", "GET /metricsx x"] {
            assert!(answer(no).is_none(), "{no}");
        }
    }

    #[test]
    fn a_file_is_replaced_whole() {
        let dir = std::env::temp_dir().join(format!("devsplice-metrics-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("devsplice.prom");
        std::fs::write(&path, "old and longer").unwrap();
        replace(&path, "new").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "new");
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 1);
        assert!(replace(&dir.join("no/such"), "new").is_err());
        std::fs::remove_dir_all(dir).unwrap();
    }
}
