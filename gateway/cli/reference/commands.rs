//! The commands, with every argument and exit status.

use std::fmt::Write;

use clap::{Arg, Command, CommandFactory};

use super::super::Cli;
use super::cell;

/// What an exit status means, where it means more than that something went wrong.
const STATUSES: [(&str, u8, &str); 7] = [
    ("check", 1, "a file has a problem"),
    ("audit verify", 1, "the journal is not proved"),
    ("audit verify", 2, "it cannot be read"),
    ("prices check", 1, "a file has a problem"),
    ("import litellm", 1, "with `--strict`, something is not supported"),
    ("key check", 1, "the key is not let in"),
    ("serve", 1, "it cannot start: the settings or the policy have problems, or an address is taken"),
];

/// A section for each command.
pub(super) fn markdown() -> String {
    let mut out =
        "Exit status: 0 where all went well, 1 where something did not (it is told on the standard error), 2 where \
                   the arguments are wrong. Without a command, `infergate` serves.\n\n"
            .to_owned();
    leaves(&Cli::command(), "", &mut |path, command| section(&mut out, path, command));
    out
}

/// Calls `tell` with every command that does something itself, and its path.
fn leaves(command: &Command, path: &str, tell: &mut impl FnMut(&str, &Command)) {
    for command in command.get_subcommands().filter(|command| command.get_name() != "help") {
        let path = format!("{path} {}", command.get_name()).trim_start().to_owned();
        match command.has_subcommands() {
            true => leaves(command, &path, tell),
            false => tell(&path, command),
        }
    }
}

fn section(out: &mut String, path: &str, command: &Command) {
    let about = command.get_about().map(ToString::to_string).unwrap_or_default();
    let _ = writeln!(out, "#### infergate {path}\n\n{about}.\n\n| argument | what it means |\n|---|---|");
    for argument in
        command.get_arguments().filter(|argument| !["help", "version"].contains(&argument.get_id().as_str()))
    {
        let _ = writeln!(out, "| `{}` | {} |", cell(&written(argument)), cell(&meaning(argument)));
    }
    for (_, status, meaning) in STATUSES.iter().filter(|(of, ..)| *of == path) {
        let _ = writeln!(out, "| exit status {status} | {meaning} |");
    }
    out.push('\n');
}

/// An argument as it is typed.
fn written(argument: &Arg) -> String {
    let values = argument.get_value_names().unwrap_or_default().iter().map(|name| format!("<{name}>"));
    let values: Vec<String> = values.filter(|_| argument.get_action().takes_values()).collect();
    let flag = argument.get_long().map(|long| format!("--{long}"));
    flag.into_iter().chain(values).collect::<Vec<_>>().join(" ")
}

fn meaning(argument: &Arg) -> String {
    let mut told = argument.get_help().map(ToString::to_string).unwrap_or_default();
    let takes = argument.get_action().takes_values();
    let choices: Vec<String> = argument
        .get_possible_values()
        .iter()
        .map(|value| format!("`{}`", value.get_name()))
        .filter(|_| takes)
        .collect();
    if !choices.is_empty() {
        told += &format!(". One of {}", choices.join(", "));
    }
    let default: Vec<_> = argument.get_default_values().iter().map(|value| value.to_string_lossy()).collect();
    // A path is that of this machine.
    if takes && !default.is_empty() && !default[0].starts_with('/') {
        told += &format!(". Default: `{}`", default.join(" "));
    }
    if let Some(name) = argument.get_env() {
        told += &format!(". Or in `{}`", name.to_string_lossy());
    }
    told
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_status_belongs_to_a_command_and_every_argument_says_what_it_is() {
        let mut paths = Vec::new();
        leaves(&Cli::command(), "", &mut |path, command| {
            paths.push(path.to_owned());
            for argument in command.get_arguments() {
                assert!(argument.get_help().is_some(), "{path}: {}", argument.get_id());
            }
        });
        assert!(STATUSES.iter().all(|(of, ..)| paths.iter().any(|path| path == of)), "{paths:?}");
        assert!(paths.len() > 15, "{paths:?}");
    }
}
