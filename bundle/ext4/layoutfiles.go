package ext4

import (
	"iter"
	"path"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/filetree"
)

// LayoutFile is a name in an image, and what its layout tells of it.
type LayoutFile struct {
	Path string // relative to the root, as [filetree.Tree.Path]
	Mode uint32 // type, unix.S_IFMT; of one more name of an inode that came before 0
	Ino  uint32 // in the image
	Link bool   // it is one more name of an inode that came before
	Size int64  // of a regular file, bytes
	// Data says where in the image the data of a regular file lie, ascending by
	// the offset in the file, whole blocks; the rest is holes.
	Data []Origin
	// Facts tells that the times when it was captured are known.
	Facts        bool
	Mtime, Ctime filetree.Time
}

// Files yields all names of the image but the root's: directory by directory,
// a directory before those in it, both by the bytes of their names. Data is not
// to be kept or changed.
func (l *Layout) Files() iter.Seq[LayoutFile] {
	return func(yield func(LayoutFile) bool) {
		dirs := map[filetree.ID]string{filetree.Root: ""}
		next := filetree.Root
		w := newLayoutWalk(l, next)
		var data []Origin
		for w.directory() {
			dir := dirs[w.id]
			delete(dirs, w.id)
			for w.next() {
				r := &w.rec
				f := LayoutFile{
					Path: path.Join(dir, string(r.name)), Mode: r.mode, Ino: r.ino, Link: r.mode == 0, Size: r.size,
					Facts: r.facts, Mtime: r.mtime, Ctime: r.ctime,
				}
				if r.mode == unix.S_IFDIR {
					next++
					dirs[next] = f.Path
					w.descend(next)
				}
				data = data[:0]
				c := cursor{runs: r.runs}
				for _, p := range r.pieces {
					at := p.start
					for _, t := range c.taken(nil, p.n) {
						data = append(data, Origin{at * BlockSize, t.start * BlockSize, t.n * BlockSize})
						at += t.n
					}
				}
				f.Data = data
				if !yield(f) {
					return
				}
			}
		}
	}
}
