package rootfs

// snapshotPrefix begins the names of the snapshots taken for a capture, in
// the volume's root directory.
const snapshotPrefix = ".instar-snapshot-"
