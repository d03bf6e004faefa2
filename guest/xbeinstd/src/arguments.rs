//! The command line.

/// How the agent was called.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Arguments {
    /// In an image that boots by itself.
    pub(crate) service: bool,
    /// Leaves the machine alone: nothing is mounted, set or switched off.
    pub(crate) no_mount: bool,
    /// The boot's configuration.
    pub(crate) boot_config: Option<String>,
    /// A unix socket in place of the configuration's transport.
    pub(crate) connect: Option<String>,
    /// The root in place of `/`.
    pub(crate) root: Option<String>,
}

impl Arguments {
    /// Reads the arguments after the program's name.
    pub(crate) fn parse(arguments: &[String]) -> Result<Arguments, String> {
        let mut parsed = Arguments::default();
        let mut rest = arguments.iter();
        while let Some(argument) = rest.next() {
            let mut value = |what: &str| {
                rest.next()
                    .cloned()
                    .ok_or(format!("{argument} needs {what}"))
            };
            match argument.as_str() {
                "--service" => parsed.service = true,
                "--no-mount" => parsed.no_mount = true,
                "--boot-config" => parsed.boot_config = Some(value("a file")?),
                "--root" => parsed.root = Some(value("a directory")?),
                "--connect" => {
                    let target = value("unix:PATH")?;
                    let path = target
                        .strip_prefix("unix:")
                        .ok_or("--connect needs unix:PATH")?;
                    parsed.connect = Some(path.into());
                }
                file if parsed.service
                    && !file.starts_with('-')
                    && parsed.boot_config.is_none() =>
                {
                    parsed.boot_config = Some(file.into());
                }
                other => return Err(format!("unknown argument {other:?}")),
            }
        }
        if parsed.service == parsed.no_mount {
            return Err("not PID 1: say --service or --no-mount".into());
        }
        Ok(parsed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Arguments, String> {
        Arguments::parse(
            &line
                .split_whitespace()
                .map(String::from)
                .collect::<Vec<_>>(),
        )
    }

    #[test]
    fn both_ways_of_calling() {
        let service = parse("--service /etc/xbee/boot").unwrap();
        assert_eq!(service.boot_config.as_deref(), Some("/etc/xbee/boot"));
        let test = parse("--no-mount --boot-config b --connect unix:/s --root /r").unwrap();
        assert_eq!(test.connect.as_deref(), Some("/s"));
        assert_eq!(test.root.as_deref(), Some("/r"));
        for wrong in [
            "",
            "--service --no-mount",
            "--no-mount x",
            "--root",
            "--no-mount --connect tcp:1",
        ] {
            parse(wrong).unwrap_err();
        }
    }
}
