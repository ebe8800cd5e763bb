// Package rootfs walks a live root filesystem and says what belongs in an
// image of it.
//
// In goes a directory, the volume; out comes a [Root]: a filetree.Tree of
// everything that goes in, a filetree.Source that opens the content, and
// lists of what stays out and why. The walk reads metadata, and of content
// only what it needs to recognise secrets. It never writes to the volume,
// save for the read-only snapshot of a btrfs volume, which it deletes again,
// never freezes a filesystem, never waits for a FIFO and never leaves the
// volume: every name is opened relative to the directory it was found in,
// without following symbolic links.
package rootfs
