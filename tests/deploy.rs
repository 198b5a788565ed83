//! What ships to run it with: the image, compose, the chart, manifests and units fit the gateway that they start.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use infergate::policy::problem::Document;
use infergate::settings::Settings;
use serde_json::{Value, json};

use crate::support::chart::{Chart, against};
use crate::support::prometheus::shipped;
use crate::support::{Gateway, Process, model_server, policy};

fn yaml(path: &str) -> Value {
    documents(path).remove(0)
}

fn documents(path: &str) -> Vec<Value> {
    let text = fs::read_to_string(shipped(path)).unwrap();
    let parts =
        text.split("\n---\n").map(|part| Document::parse(part).unwrap_or_else(|problem| panic!("{path}: {problem}")));
    parts.map(|document| document.value).collect()
}

/// `infergate check` takes it.
fn is_good(kind: &str, text: &str) {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), text).unwrap();
    let (code, told, _) = Process::run(&["check", "--kind", kind, "--without-secrets", file.path().to_str().unwrap()]);
    assert_eq!(code, Some(0), "{told}\n{text}");
}

/// Every word of a command line that ours knows: its subcommand and its flags.
fn is_a_command(words: &[&str]) {
    let (code, help, _) = Process::run(&[words[0], "--help"]);
    assert_eq!(code, Some(0), "{words:?}");
    for flag in words.iter().filter(|word| word.starts_with("--")) {
        assert!(help.contains(&format!("{flag} ")) || help.contains(&format!("{flag}\n")), "{flag} of {words:?}");
    }
}

fn strings(list: &Value) -> Vec<&str> {
    list.as_array().unwrap().iter().map(|word| word.as_str().unwrap()).collect()
}

fn yaml_files(directory: &Path, found: &mut Vec<std::path::PathBuf>) {
    for path in fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()) {
        match path.extension().and_then(|extension| extension.to_str()) {
            _ if path.is_dir() => yaml_files(&path, found),
            Some("yaml" | "yml") => found.push(path),
            _ => {}
        }
    }
}

#[test]
fn every_yaml_file_is_one() {
    let mut files = Vec::new();
    yaml_files(&shipped(""), &mut files);
    let plain = files.iter().filter(|path| !path.components().any(|part| part.as_os_str() == "templates"));
    let mut count = 0;
    for path in plain {
        for part in fs::read_to_string(path).unwrap().split("\n---\n") {
            Document::parse(part).unwrap_or_else(|problem| panic!("{path:?}: {problem}"));
            count += 1;
        }
    }
    assert!(count > 14, "{count}");
}

// Compose.

#[test]
fn the_policies_and_settings_of_compose_are_good() {
    for name in ["policy", "policy-shared"] {
        is_good("policy", &fs::read_to_string(shipped(&format!("compose/{name}.yaml"))).unwrap());
    }
    for name in ["settings", "settings-postgres"] {
        is_good("settings", &fs::read_to_string(shipped(&format!("compose/{name}.yaml"))).unwrap());
    }
}

#[test]
fn composes_commands_addresses_and_times_fit() {
    let compose = yaml("compose.yaml");
    let services = compose["services"].as_object().unwrap();
    for (name, service) in services.iter().filter(|(_, service)| service["image"] == "infergate") {
        is_a_command(&strings(&service["command"]));
        assert_eq!(service["read_only"], true, "{name}");
        assert_eq!(service["cap_drop"], json!(["ALL"]), "{name}");
    }
    // Where the policy looks for servers, servers listen.
    let policy = yaml("compose/policy.yaml");
    for upstream in policy["pools"]["demo"]["upstreams"].as_array().unwrap() {
        let host = upstream["url"].as_str().unwrap().strip_prefix("http://").unwrap();
        let (service, port) = host.split_once(':').unwrap();
        let command = strings(&services[service]["command"]);
        assert!(command.contains(&format!("0.0.0.0:{port}").as_str()), "{host}: {command:?}");
        for model in policy["models"].as_array().unwrap() {
            assert!(command.contains(&model["name"].as_str().unwrap()), "{host} has no {model}");
        }
    }
    // Only this machine reaches what has no password.
    let ports =
        services.values().filter(|service| service["ports"].is_array()).flat_map(|service| strings(&service["ports"]));
    let ports: Vec<&str> = ports.collect();
    assert!(ports.len() >= 5 && ports.iter().all(|port| port.starts_with("127.0.0.1:")), "{ports:?}");
    // What is published listens.
    let settings = Settings::load(&shipped("compose/settings.yaml")).unwrap();
    assert_eq!(settings.listeners[0].address, "0.0.0.0:8080");
    assert_eq!(settings.admin.address, "0.0.0.0:9090");
    let grace: u64 =
        services["infergate"]["stop_grace_period"].as_str().unwrap().trim_end_matches('s').parse().unwrap();
    assert!(grace * 1000 > settings.shutdown.drain_delay_ms + settings.shutdown.drain_ms);
    // Files that are mounted are there.
    let mounts = services.values().filter_map(|service| service["volumes"].as_array()).flatten();
    for mount in mounts.filter_map(|mount| mount.as_str()?.split(':').next()?.strip_prefix("./")) {
        assert!(shipped(mount).is_dir(), "{mount}");
    }
    // Prometheus asks the gateway by the name that it has here.
    let targets = &yaml("prometheus/prometheus.yaml")["scrape_configs"][0]["static_configs"][0]["targets"];
    assert!(
        targets[0].as_str().unwrap().split(':').next().is_some_and(|host| services.contains_key(host)),
        "{targets}"
    );
}

// The chart.

fn chart() -> Chart {
    Chart::read(&shipped("helm/infergate"))
}

/// The values that ship, and some with everything on.
fn all_values() -> Vec<Value> {
    let everything = json!({
        "autoscaling": {"enabled": true}, "serviceMonitor": {"enabled": true, "labels": {"release": "prometheus"}},
        "settings": {"threads": 4, "ledger": {"rows": "all"}}, "drain": {"preStopSeconds": 5, "seconds": 60},
        "podLabels": {"team": "ml"}, "podAnnotations": {"a": "b"}, "env": [{"name": "OPENAI_API_KEY", "value": "x"}],
        "envFrom": [{"secretRef": {"name": "keys"}}], "imagePullSecrets": [{"name": "pull"}],
        "tolerations": [{"key": "gpu", "operator": "Exists"}], "nodeSelector": {"pool": "cpu"},
        "affinity": {"podAntiAffinity": {}}, "priorityClassName": "high",
        "topologySpreadConstraints": [{"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway"}],
        "networkPolicy": {"egress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}]},
        "persistence": {"existingClaim": "journal"}, "service": {"annotations": {"a": "b"}},
        "serviceAccount": {"annotations": {"a": "b"}}, "image": {"tag": "1.2.3"},
        "policy": {"version": 1, "models": [], "pools": {"gpus": {"upstreams": [{"url": "unix:/run/a b.sock", "weight": 2}]}}}
    });
    vec![json!({}), yaml("helm/infergate/values-sidecar.yaml"), everything]
}

fn of<'a>(objects: &'a [Value], kind: &str) -> Vec<&'a Value> {
    objects.iter().filter(|object| object["kind"] == kind).collect()
}

#[test]
fn the_charts_policy_and_settings_are_good_whatever_it_is_told() {
    for over in all_values() {
        let objects = chart().render(&over);
        let data = &of(&objects, "ConfigMap")[0]["data"];
        is_good("policy", data["policy.yaml"].as_str().unwrap());
        is_good("settings", data["settings.yaml"].as_str().unwrap());
        assert!(of(&objects, "Deployment").len() == 1 && of(&objects, "Service").len() == 2);
        for object in &objects {
            for key in ["apiVersion", "kind"] {
                assert!(object[key].is_string(), "{object}");
            }
            assert!(object["metadata"]["name"].as_str().unwrap().starts_with("gate"), "{object}");
        }
    }
}

#[test]
fn a_pod_of_the_chart_is_hardened_selected_and_has_time_to_go_down() {
    for over in all_values() {
        let chart = chart();
        let (objects, values) = (chart.render(&over), chart.values(&over));
        let deployment = of(&objects, "Deployment")[0];
        let (template, pod) = (&deployment["spec"]["template"], &deployment["spec"]["template"]["spec"]);
        let gateway = &pod["containers"][0];
        is_a_command(&strings(&gateway["args"]));
        let security = &gateway["securityContext"];
        assert_eq!((&security["runAsNonRoot"], &security["readOnlyRootFilesystem"]), (&true.into(), &true.into()));
        assert_eq!(security["capabilities"]["drop"], json!(["ALL"]));
        // The grace period holds the whole drain.
        let data = &of(&objects, "ConfigMap")[0]["data"];
        let settings = Settings::parse(data["settings.yaml"].as_str().unwrap()).unwrap();
        let before = values["drain"]["preStopSeconds"].as_u64().unwrap();
        let drain = settings.shutdown.drain_delay_ms + settings.shutdown.drain_ms;
        assert!(pod["terminationGracePeriodSeconds"].as_u64().unwrap() * 1000 > before * 1000 + drain);
        assert_eq!(gateway["lifecycle"]["preStop"]["sleep"]["seconds"].as_u64().unwrap_or(0), before);
        // Everything that selects pods selects these.
        let selectors = [&deployment["spec"]["selector"]["matchLabels"]].into_iter();
        let selectors = selectors
            .chain(of(&objects, "Service").iter().map(|service| &service["spec"]["selector"]).collect::<Vec<_>>());
        let selectors = selectors.chain(
            of(&objects, "PodDisruptionBudget")
                .iter()
                .map(|one| &one["spec"]["selector"]["matchLabels"])
                .collect::<Vec<_>>(),
        );
        let selectors = selectors.chain(
            of(&objects, "NetworkPolicy")
                .iter()
                .map(|one| &one["spec"]["podSelector"]["matchLabels"])
                .collect::<Vec<_>>(),
        );
        for (key, value) in selectors.flat_map(|labels| labels.as_object().unwrap()) {
            assert_eq!(&template["metadata"]["labels"][key], value, "{key}");
        }
        // Ports by name are ports of the container, and those are where the gateway listens.
        let ports = gateway["ports"].as_array().unwrap();
        let port = |name: &str| ports.iter().find(|port| port["name"] == name).unwrap()["containerPort"].clone();
        assert_eq!((port("http"), port("admin")), (8080.into(), 9090.into()));
        assert_eq!((&*settings.listeners[0].address, &*settings.admin.address), ("0.0.0.0:8080", "0.0.0.0:9090"));
        // Directories are mounted, so that a changed ConfigMap arrives; and every mount has its volume.
        let volumes: BTreeSet<&str> =
            pod["volumes"].as_array().unwrap().iter().map(|volume| volume["name"].as_str().unwrap()).collect();
        let mounts = pod["containers"]
            .as_array()
            .unwrap()
            .iter()
            .flat_map(|container| container["volumeMounts"].as_array().unwrap());
        for mount in mounts {
            assert!(mount["subPath"].is_null() && volumes.contains(mount["name"].as_str().unwrap()), "{mount}");
        }
    }
    let sidecar = chart().render(&yaml("helm/infergate/values-sidecar.yaml"));
    assert_eq!(of(&sidecar, "Deployment")[0]["spec"]["template"]["spec"]["containers"][1]["name"], "vllm");
}

#[tokio::test]
async fn what_the_chart_probes_and_scales_by_exists() {
    let server = model_server().await;
    let gateway = Gateway::start(&policy(&[&server.url()], "concurrency: {max: 4}")).await;
    let page = gateway.admin("/metrics").await.text();
    let objects = chart().render(&all_values()[2]);
    let metrics = of(&objects, "HorizontalPodAutoscaler")[0]["spec"]["metrics"].as_array().unwrap();
    assert_eq!(metrics.len(), 2);
    for metric in metrics {
        let name = metric["pods"]["metric"]["name"].as_str().unwrap();
        let there = page.lines().any(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])));
        assert!(there, "{name}");
    }
    let container = &of(&objects, "Deployment")[0]["spec"]["template"]["spec"]["containers"][0];
    for probe in ["startupProbe", "livenessProbe", "readinessProbe"] {
        let path = container[probe]["httpGet"]["path"].as_str().unwrap();
        assert_eq!(gateway.admin(path).await.status, 200, "{path}");
    }
    let monitor = of(&objects, "ServiceMonitor")[0];
    assert_eq!(gateway.admin(monitor["spec"]["endpoints"][0]["path"].as_str().unwrap()).await.status, 200);
}

#[test]
fn the_charts_schema_takes_its_values_and_refuses_others() {
    let schema: Value =
        serde_json::from_slice(&fs::read(shipped("helm/infergate/values.schema.json")).unwrap()).unwrap();
    let chart = chart();
    for over in all_values() {
        assert_eq!(against(&schema, &chart.values(&over), "values"), Vec::<String>::new());
    }
    // Every value that there is has its place in the schema.
    let known = schema["properties"].as_object().unwrap();
    assert!(chart.values(&json!({})).as_object().unwrap().keys().all(|key| known.contains_key(key)));
    for bad in [
        json!({"replicas": "two"}),
        json!({"polcy": {}}),
        json!({"policy": {"version": 2}}),
        json!({"settings": {"listeners": []}}),
        json!({"service": {"type": "Ingress"}}),
        json!({"drain": {"seconds": -1}}),
        json!({"image": {"repository": ""}}),
    ] {
        assert_eq!(against(&schema, &chart.values(&bad), "values").len(), 1, "{bad}");
    }
}

#[test]
fn the_sidecar_without_helm_fits_itself() {
    let objects = documents("kubernetes/vllm-sidecar.yaml");
    let data = &of(&objects, "ConfigMap")[0]["data"];
    is_good("policy", data["policy.yaml"].as_str().unwrap());
    let settings = Settings::parse(data["settings.yaml"].as_str().unwrap()).unwrap();
    let deployment = of(&objects, "Deployment")[0];
    let pod = &deployment["spec"]["template"]["spec"];
    let grace = pod["terminationGracePeriodSeconds"].as_u64().unwrap() * 1000;
    assert!(grace > settings.shutdown.drain_delay_ms + settings.shutdown.drain_ms);
    is_a_command(&strings(&pod["initContainers"][0]["args"]));
    assert_eq!(pod["initContainers"][0]["restartPolicy"], "Always");
    let upstream =
        &Document::parse(data["policy.yaml"].as_str().unwrap()).unwrap().value["pools"]["own"]["upstreams"][0]["url"];
    let port = upstream.as_str().unwrap().rsplit(':').next().unwrap().to_owned();
    assert!(strings(&pod["containers"][0]["args"]).contains(&port.as_str()));
    assert_eq!(of(&objects, "Service")[0]["spec"]["selector"], deployment["spec"]["template"]["metadata"]["labels"]);
}

// systemd and the image.

#[test]
fn the_unit_starts_what_there_is_and_waits_for_the_drain() {
    let unit = fs::read_to_string(shipped("systemd/infergate@.service")).unwrap();
    let line = |key: &str| {
        unit.lines().find_map(|line| line.strip_prefix(&format!("{key}="))).unwrap_or_else(|| panic!("{key}"))
    };
    let words: Vec<&str> = line("ExecStart").split_whitespace().skip(1).filter(|word| !word.starts_with('$')).collect();
    is_a_command(&words);
    let settings = Settings::load(&shipped("systemd/settings.yaml")).unwrap();
    let socket = settings.upgrade_socket.unwrap();
    assert_eq!(socket.parent().unwrap(), Path::new("/run").join(line("RuntimeDirectory")));
    let seconds: u64 = line("TimeoutStopSec").parse().unwrap();
    assert!(seconds * 1000 > settings.shutdown.drain_delay_ms + settings.shutdown.drain_ms);
    assert_eq!((line("NoNewPrivileges"), line("ProtectSystem"), line("CapabilityBoundingSet")), ("yes", "strict", ""));
    assert!(!unit.contains("\nProcSubset="), "the memory ceiling is taken from /proc/meminfo");
    let script = fs::read_to_string(shipped("systemd/infergate-upgrade")).unwrap();
    assert!(script.contains("INFERGATE_TAKE_OVER=--upgrade") && line("ExecStart").ends_with("$INFERGATE_TAKE_OVER"));
    assert!(script.contains(socket.file_name().unwrap().to_str().unwrap()));
    is_a_command(&["serve", "--upgrade"]);
}

#[test]
fn systemd_finds_nothing_wrong_with_the_unit() {
    // A machine without systemd has nobody to ask.
    let Ok(version) = Command::new("systemd-analyze").arg("--version").output() else { return };
    assert!(version.status.success());
    let directory = tempfile::tempdir().unwrap();
    let unit = fs::read_to_string(shipped("systemd/infergate@.service")).unwrap();
    let path = directory.path().join("infergate@.service");
    fs::write(&path, unit.replace("/usr/local/bin/infergate", env!("CARGO_BIN_EXE_infergate"))).unwrap();
    let told = Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&path).output().unwrap();
    let told = String::from_utf8_lossy(&told.stderr).into_owned();
    // Whom it runs as is made when it is installed.
    let ours: Vec<&str> = told.lines().filter(|line| line.contains("infergate")).collect();
    assert_eq!(ours, Vec::<&str>::new());
    let instance = directory.path().join("infergate@a.service");
    fs::copy(&path, &instance).unwrap();
    let told = Command::new("systemd-analyze")
        .args(["security", "--offline=true", "--threshold=15"])
        .arg(&instance)
        .output()
        .unwrap();
    assert!(told.status.success(), "exposed beyond 1.5: {}", String::from_utf8_lossy(&told.stdout));
}

/// A `systemctl` that starts and ends processes as the unit says, for the script that upgrades.
const SYSTEMCTL: &str = r#"#!/bin/sh
# What the script asks of systemd, done by hand: is-active, start, kill, stop, enable, disable.
set -u
run=$INFERGATE_RUNTIME_DIRECTORY
verb=$1; shift
for word; do case $word in infergate@*) name=${word#infergate@} ;; --signal=*) signal=${word#--signal=} ;; esac; done
pid() { cat "$run/$name.pid" 2>/dev/null || echo 0; }
case $verb in
  is-active) [ "$(pid)" -gt 0 ] && kill -0 "$(pid)" 2>/dev/null && [ "$(ps -o stat= -p "$(pid)" | cut -c1)" != Z ] ;;
  start) . "$run/$name.env"; "$PROGRAM" serve --policy "$POLICY" --settings "$SETTINGS" $INFERGATE_TAKE_OVER >"$run/$name.log" 2>&1 & echo $! >"$run/$name.pid" ;;
  kill) kill -"$signal" "$(pid)" ;;
  stop) kill -TERM "$(pid)" ;;
esac
"#;

#[tokio::test]
async fn the_upgrade_script_hands_the_sockets_to_the_other_instance() {
    use std::os::unix::fs::PermissionsExt;
    let server = model_server().await;
    let run = tempfile::tempdir().unwrap();
    let socket = run.path().join("upgrade.sock");
    let settings =
        format!("threads: 2\nupgrade_socket: {}\nshutdown: {{drain_delay_ms: 0, drain_ms: 20000}}\n", socket.display());
    let mut gateway = Gateway::with(&policy(&[&server.url()], ""), &settings, &[]).await;
    fs::write(run.path().join("a.pid"), gateway.pid().to_string()).unwrap();
    let systemctl = run.path().join("systemctl");
    fs::write(&systemctl, SYSTEMCTL).unwrap();
    fs::set_permissions(&systemctl, fs::Permissions::from_mode(0o755)).unwrap();
    // The script names the installed binary, and the settings that this gateway was started with have other addresses.
    let script = fs::read_to_string(shipped("systemd/infergate-upgrade")).unwrap();
    let script = script.replace("/usr/local/bin/infergate", env!("CARGO_BIN_EXE_infergate"));
    let settings_path = gateway.directory.path().join("settings.yaml");
    let with_addresses =
        format!("listeners: [{{address: '{}'}}]\nadmin: {{address: '{}'}}\n{settings}", gateway.address, gateway.admin);
    fs::write(&settings_path, with_addresses).unwrap();
    let path = format!("{}:{}", run.path().display(), std::env::var("PATH").unwrap());
    let upgraded = Command::new("sh")
        .args(["-c", &script])
        .env("PATH", path)
        .env("PROGRAM", env!("CARGO_BIN_EXE_infergate"))
        .env("POLICY", gateway.policy_path())
        .env("SETTINGS", &settings_path)
        .env("INFERGATE_SETTINGS", &settings_path)
        .env("INFERGATE_RUNTIME_DIRECTORY", run.path())
        .env("INFERGATE_JOURNAL", run.path().join("journal"))
        .output()
        .unwrap();
    let told = format!("{}{}", String::from_utf8_lossy(&upgraded.stdout), String::from_utf8_lossy(&upgraded.stderr));
    assert!(upgraded.status.success() && told.contains("infergate@b serves"), "{told}");
    assert_eq!(gateway.ended(std::time::Duration::from_secs(20)).await, Some(0));
    gateway.ready().await;
    assert!(!run.path().join("b.env").exists());
    let next = fs::read_to_string(run.path().join("b.pid")).unwrap();
    assert!(Command::new("kill").args(["-KILL", next.trim()]).status().unwrap().success());
}

// What is released.

#[test]
fn the_bill_of_materials_is_whole_and_the_same_each_time() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let bill = || {
        Command::new("python3")
            .arg(shipped("sbom"))
            .current_dir(root)
            .env("SOURCE_DATE_EPOCH", "1700000000")
            .output()
            .unwrap()
    };
    let (first, second) = (bill(), bill());
    assert!(first.status.success(), "{}", String::from_utf8_lossy(&first.stderr));
    assert_eq!(first.stdout, second.stdout);
    let bill: Value = serde_json::from_slice(&first.stdout).unwrap();
    assert_eq!(
        (&bill["bomFormat"], &bill["specVersion"], &bill["version"]),
        (&"CycloneDX".into(), &"1.6".into(), &1.into())
    );
    assert_eq!(bill["metadata"]["timestamp"], "2023-11-14T22:13:20Z");
    assert!(bill["serialNumber"].as_str().unwrap().starts_with("urn:uuid:"));
    assert_eq!(bill["metadata"]["component"]["name"], "infergate");
    // Every crate of the lock that is linked in is there, with licence and checksum; every reference leads somewhere.
    let components = bill["components"].as_array().unwrap();
    let mut known: BTreeSet<&str> = components.iter().map(|one| one["bom-ref"].as_str().unwrap()).collect();
    assert_eq!(known.len(), components.len());
    known.insert(bill["metadata"]["component"]["bom-ref"].as_str().unwrap());
    for component in components {
        assert!(
            component["licenses"][0]["expression"].as_str().is_some_and(|licence| licence != "NOASSERTION"),
            "{component}"
        );
        let own = ["infergate-plugins", "libz-ng-sys"].contains(&component["name"].as_str().unwrap());
        let checksum = component["hashes"][0]["content"].as_str().unwrap_or_default();
        assert!(own || checksum.len() == 64, "{component}");
        assert!(component["purl"].as_str().unwrap().starts_with("pkg:cargo/"), "{component}");
    }
    let dependencies = bill["dependencies"].as_array().unwrap();
    assert_eq!(dependencies.len(), known.len());
    let named = dependencies.iter().flat_map(|one| strings(&one["dependsOn"]).into_iter().chain(one["ref"].as_str()));
    assert!(named.into_iter().all(|name| known.contains(name)));
    for name in ["tokio", "rustls", "serde_json", "rusqlite"] {
        let there = components.iter().find(|one| one["name"] == name).unwrap_or_else(|| panic!("{name}"));
        assert_eq!(there["scope"], "required", "{name}");
    }
    // What only tests need is not shipped.
    assert!(!components.iter().any(|one| ["criterion", "tempfile", "rcgen"].contains(&one["name"].as_str().unwrap())));
}

#[test]
fn a_release_is_packed_the_same_each_time_and_its_checksums_hold() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let directory = tempfile::tempdir().unwrap();
    // Any binary does: it is only packed here.
    let binary = directory.path().join("binary");
    fs::copy("/bin/true", &binary).unwrap();
    let pack = |name: &str| {
        let out = directory.path().join(name);
        let packed = Command::new(shipped("release"))
            .args(["--out", out.to_str().unwrap(), "--binary", binary.to_str().unwrap()])
            .env("SOURCE_DATE_EPOCH", "1700000000")
            .current_dir(root)
            .output()
            .unwrap();
        assert!(packed.status.success(), "{}", String::from_utf8_lossy(&packed.stderr));
        (out, String::from_utf8(packed.stdout).unwrap())
    };
    let ((first, sums), (_, again)) = (pack("first"), pack("second"));
    assert_eq!(sums, again, "two archives of one commit are the same bytes");
    let checked =
        Command::new("sha256sum").args(["--check", "--strict", "SHA256SUMS"]).current_dir(&first).output().unwrap();
    assert!(checked.status.success() && sums.lines().count() == 3, "{sums}");
    let archive =
        sums.lines().find_map(|line| line.split_whitespace().nth(1).filter(|name| name.ends_with(".tar.gz"))).unwrap();
    let listed = Command::new("tar").args(["-tzf", archive]).current_dir(&first).output().unwrap();
    let listed = String::from_utf8(listed.stdout).unwrap();
    for name in ["infergate", "LICENSE", "NOTICE", "NOTICE.model", "infergate.cdx.json", "config/policy.yaml"] {
        assert!(listed.lines().any(|line| line.ends_with(&format!("/{name}"))), "{name}: {listed}");
    }
}

#[test]
fn the_image_is_built_locked_and_runs_without_root_or_shell() {
    let text = fs::read_to_string(shipped("Dockerfile")).unwrap();
    let last = text.rsplit("\nFROM ").next().unwrap();
    assert!(text.contains("cargo build --release --locked"));
    assert!(last.contains("\nUSER 65532:65532") && last.contains("\nSTOPSIGNAL SIGTERM"));
    assert!(!last.contains("\nRUN "), "the base has no shell");
    let command = last.lines().find_map(|line| line.strip_prefix("CMD ")).unwrap();
    let command: Vec<String> = serde_json::from_str(command).unwrap();
    is_a_command(&command.iter().map(String::as_str).collect::<Vec<_>>());
    // What the stages copy is there, or made in a stage.
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for name in ["LICENSE", "NOTICE", "config/policy.yaml", "config/prices.yaml"] {
        assert!(root.join(name).is_file() && text.contains(name), "{name}");
    }
    let ignored = fs::read_to_string(root.join(".dockerignore")).unwrap();
    assert!(ignored.lines().any(|line| line == "target") && ignored.lines().any(|line| line == ".git"));
}
