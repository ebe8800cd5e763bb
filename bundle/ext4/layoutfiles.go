package ext4

import (
	"iter"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/filetree"
)

// LayoutFile is one name in an image.
type LayoutFile struct {
	Path string // relative to the root: "etc/passwd"
	Mode uint32 // type bits; 0 if Link
	Ino  uint32 // in the image
	Link bool   // it is one more name of the inode Ino, which came before and has the rest
	// Of a regular file:
	Size         int64
	Facts        bool          // Mtime and Ctime are known: the file did not change while it was captured
	Mtime, Ctime filetree.Time // when it was captured
	Data         []Origin      // where its data lie in the image, by ascending Off; valid until the next file
}

// Files yields all names of an image but the root: those of a directory by
// their bytes, then those of its directories in the same order.
func (l *Layout) Files() iter.Seq[LayoutFile] {
	return func(yield func(LayoutFile) bool) {
		paths := []string{""} // of directories to come, by what they have as id
		var data []Origin
		w := newLayoutWalk(l, 0)
		for w.directory() {
			dir := paths[w.id]
			paths[w.id] = ""
			for w.next() {
				r := &w.rec
				f := LayoutFile{Path: dir + string(r.name), Mode: r.mode, Ino: r.ino, Link: r.mode == 0}
				switch r.mode {
				case unix.S_IFDIR:
					w.descend(filetree.ID(len(paths)))
					paths = append(paths, f.Path+"/")
				case unix.S_IFREG:
					data = origins(data[:0], r.pieces, r.runs)
					f.Size, f.Facts, f.Mtime, f.Ctime, f.Data = r.size, r.facts, r.mtime, r.ctime, data
				}
				if !yield(f) {
					return
				}
			}
		}
	}
}

// origins appends where the pieces of a file lie, whose blocks are in runs.
func origins(o []Origin, pieces, runs []run) []Origin {
	c := cursor{runs: runs}
	for _, p := range pieces {
		for at, n := p.start, p.n; n > 0; {
			r := c.run(n)
			o = append(o, Origin{at * BlockSize, r.start * BlockSize, r.n * BlockSize})
			at += r.n
			n -= r.n
		}
	}
	return o
}
