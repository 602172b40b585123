//! A tree of topic levels in an arena.

use hashbrown::HashMap;
use slab::Slab;

/// No such node.
const NONE: u32 = u32::MAX;

#[derive(Debug)]
struct Node<T> {
    children: HashMap<Box<str>, u32, foldhash::fast::RandomState>,
    plus: u32,
    hash: u32,
    value: T,
}

/// One value per path of levels; `+` and `#` are levels like others, only quicker to find.
#[derive(Debug)]
pub(super) struct Trie<T> {
    nodes: Slab<Node<T>>,
}

const ROOT: u32 = 0;

impl<T: Default> Default for Trie<T> {
    fn default() -> Self {
        let mut trie = Self { nodes: Slab::new() };
        trie.make();
        trie
    }
}

impl<T: Default> Trie<T> {
    fn make(&mut self) -> u32 {
        let node = Node { children: HashMap::default(), plus: NONE, hash: NONE, value: T::default() };
        self.nodes.insert(node) as u32
    }

    pub(super) fn value(&self, node: u32) -> &T {
        &self.nodes[node as usize].value
    }

    pub(super) fn value_mut(&mut self, node: u32) -> &mut T {
        &mut self.nodes[node as usize].value
    }

    fn child(&self, node: u32, level: &str) -> Option<u32> {
        let node = &self.nodes[node as usize];
        let found = match level {
            "+" => node.plus,
            "#" => node.hash,
            _ => return node.children.get(level).copied(),
        };
        (found != NONE).then_some(found)
    }

    /// The node of `path`, made if it is not there.
    pub(super) fn entry(&mut self, path: &str) -> u32 {
        let mut node = ROOT;
        for level in path.split('/') {
            node = if let Some(child) = self.child(node, level) {
                child
            } else {
                let child = self.make();
                let parent = &mut self.nodes[node as usize];
                match level {
                    "+" => parent.plus = child,
                    "#" => parent.hash = child,
                    _ => {
                        parent.children.insert(level.into(), child);
                    }
                }
                child
            };
        }
        node
    }

    pub(super) fn find(&self, path: &str) -> Option<u32> {
        path.split('/').try_fold(ROOT, |node, level| self.child(node, level))
    }

    /// Removes the node of `path` and its parents, as far as they have neither children nor a value that `keeps`.
    pub(super) fn prune(&mut self, path: &str, keeps: impl Fn(&T) -> bool) {
        let mut walk = vec![(ROOT, "")];
        for level in path.split('/') {
            let Some((node, _)) = walk.last() else { return };
            let Some(child) = self.child(*node, level) else { return };
            walk.push((child, level));
        }
        while let [.., (parent, _), (child, level)] = walk[..] {
            let node = &self.nodes[child as usize];
            if !node.children.is_empty() || node.plus != NONE || node.hash != NONE || keeps(&node.value) {
                return;
            }
            self.nodes.remove(child as usize);
            let parent = &mut self.nodes[parent as usize];
            match level {
                "+" => parent.plus = NONE,
                "#" => parent.hash = NONE,
                _ => {
                    parent.children.remove(level);
                    if parent.children.is_empty() {
                        parent.children = HashMap::default();
                    }
                }
            }
            walk.pop();
        }
    }

    /// Calls `visit` for each path of the tree, read as a Topic Filter, that matches the Topic Name.
    /// MQTT 5.0 §4.7.1, [MQTT-4.7.2-1].
    pub(super) fn matching_filters(&self, topic: &str, mut visit: impl FnMut(&T)) {
        let wildcards_at_root = !topic.starts_with('$');
        // Places where the walk must come back to: a node, and where the rest of the topic begins (past its end: done).
        let mut stack = vec![(ROOT, 0_usize)];
        while let Some((place, from)) = stack.pop() {
            let node = &self.nodes[place as usize];
            let wildcards = place != ROOT || wildcards_at_root;
            // `#` also matches the level above it.
            if node.hash != NONE && wildcards {
                visit(&self.nodes[node.hash as usize].value);
            }
            if from > topic.len() {
                visit(&node.value);
                continue;
            }
            let level = topic[from..].split('/').next().unwrap_or_default();
            let next = from + level.len() + 1;
            if node.plus != NONE && wildcards {
                stack.push((node.plus, next));
            }
            if let Some(child) = node.children.get(level) {
                stack.push((*child, next));
            }
        }
    }

    /// Nodes, the root not counted.
    pub(super) fn len(&self) -> usize {
        self.nodes.len() - 1
    }
}
