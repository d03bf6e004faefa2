//! Which kernel module files a list of modules needs, and in which order to load them.
//!
//! Reads `modules.dep` as depmod writes it: one line a module file, `FILE: DEPENDENCY...`, paths
//! relative to the directory of `modules.dep`.

use std::collections::{HashMap, HashSet};

/// Why the modules could not be resolved.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// A line of `modules.dep` has no colon.
    #[error("modules.dep:{line}: expected 'FILE: DEPENDENCY...'")]
    Syntax {
        /// Line number, from 1.
        line: usize,
    },
    /// No file of that name is listed: it is built into the kernel or does not exist.
    #[error("no kernel module {name:?} in modules.dep")]
    Unknown {
        /// The module's name as given.
        name: String,
    },
    /// Modules that need each other cannot be loaded.
    #[error("kernel module {file} depends on itself")]
    Cycle {
        /// Path of the module file.
        file: String,
    },
}

/// Returns the files of `names` and of all they depend on, each once, every module after what it
/// needs, otherwise in the order asked for. In names `-` and `_` mean the same, as for modprobe.
///
/// # Errors
/// Any [`Error`].
pub fn load_order<'a>(modules_dep: &'a str, names: &[String]) -> Result<Vec<&'a str>, Error> {
    let mut dependencies = HashMap::new();
    let mut files = HashMap::new();
    for (index, line) in modules_dep.lines().enumerate() {
        let (file, needs) = line
            .split_once(':')
            .ok_or(Error::Syntax { line: index + 1 })?;
        dependencies.insert(file, needs);
        files.insert(module_name(file), file);
    }
    let mut order = Order {
        dependencies,
        under_way: HashSet::new(),
        done: Vec::new(),
    };
    for name in names {
        let file = files
            .get(&module_name(name))
            .ok_or_else(|| Error::Unknown { name: name.clone() })?;
        order.visit(file)?;
    }
    Ok(order.done)
}

struct Order<'a> {
    dependencies: HashMap<&'a str, &'a str>,
    under_way: HashSet<&'a str>,
    done: Vec<&'a str>,
}

impl<'a> Order<'a> {
    fn visit(&mut self, file: &'a str) -> Result<(), Error> {
        if self.done.contains(&file) {
            return Ok(());
        }
        if !self.under_way.insert(file) {
            return Err(Error::Cycle {
                file: file.to_owned(),
            });
        }
        let needs = self.dependencies.get(file).ok_or_else(|| Error::Unknown {
            name: file.to_owned(),
        })?;
        for needed in needs.split_ascii_whitespace() {
            self.visit(needed)?;
        }
        self.done.push(file);
        Ok(())
    }
}

/// `kernel/drivers/char/hw_random/virtio-rng.ko` is the module `virtio_rng`.
fn module_name(file: &str) -> String {
    let base = file.rsplit('/').next().unwrap_or(file);
    base.strip_suffix(".ko").unwrap_or(base).replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEP: &str = "\
k/virtio.ko:
k/virtio_ring.ko: k/virtio.ko
k/vsock.ko:
k/virtio-vsock.ko: k/vsock.ko k/virtio_ring.ko k/virtio.ko
k/virtio_pci.ko: k/virtio_ring.ko k/virtio.ko
";

    fn names(list: &[&str]) -> Vec<String> {
        list.iter().map(|&name| name.to_owned()).collect()
    }

    #[test]
    fn needed_modules_come_first_and_once() {
        assert_eq!(
            load_order(DEP, &names(&["virtio_pci", "virtio_vsock"])).unwrap(),
            [
                "k/virtio.ko",
                "k/virtio_ring.ko",
                "k/virtio_pci.ko",
                "k/vsock.ko",
                "k/virtio-vsock.ko"
            ]
        );
    }

    #[test]
    fn unknown_module_is_named() {
        assert_eq!(
            load_order(DEP, &names(&["ext4"])),
            Err(Error::Unknown {
                name: "ext4".to_owned()
            })
        );
        assert_eq!(
            load_order("a.ko: b.ko\n", &names(&["a"])),
            Err(Error::Unknown {
                name: "b.ko".to_owned()
            })
        );
    }

    #[test]
    fn cycle_ends() {
        assert_eq!(
            load_order("a.ko: b.ko\nb.ko: a.ko\n", &names(&["a"])),
            Err(Error::Cycle {
                file: "a.ko".to_owned()
            })
        );
    }

    #[test]
    fn line_without_colon_is_reported_with_its_number() {
        assert_eq!(
            load_order("a.ko:\nnonsense\n", &[]),
            Err(Error::Syntax { line: 2 })
        );
    }
}
