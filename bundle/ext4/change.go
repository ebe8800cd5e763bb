package ext4

import (
	"errors"
	"fmt"

	"github.com/instar-image/instar/bundle/filetree"
)

// ChangeKind says how a file was not what the tree has.
type ChangeKind uint8

// Kinds of [Change].
const (
	// Vanished: the file was not found. It is left out of the image.
	Vanished ChangeKind = iota + 1
	// Replaced: another file was found in its place. It is left out.
	Replaced
	// Shrank: the file ended at Off; so it does in the image.
	Shrank
	// Grew: the file went on after its size, Off; it ends there in the image.
	Grew
	// Modified: the file was written to, or its metadata changed, since the
	// tree was made: what was read may be of two versions.
	Modified
	// Unreadable: Lost bytes, first at Off, could not be read. The image has
	// no data there, which reads as zeros; if the file could not be opened it
	// is empty.
	Unreadable
)

func (k ChangeKind) String() string {
	switch k {
	case Vanished:
		return "vanished"
	case Replaced:
		return "replaced"
	case Shrank:
		return "shrank"
	case Grew:
		return "grew"
	case Modified:
		return "modified"
	case Unreadable:
		return "unreadable"
	}
	return fmt.Sprintf("change %d", uint8(k))
}

// Change reports that a file changed between the making of the tree and the
// reading of its content, or could not be read.
type Change struct {
	ID   filetree.ID
	Path string // as [filetree.Tree.Path]: the first name of the file
	Kind ChangeKind
	Off  int64 // bytes
	Lost int64 // bytes
	Err  error // what the source said, if anything
}

func (c *Change) String() string {
	s := fmt.Sprintf("%q %s", c.Path, c.Kind)
	switch c.Kind {
	case Shrank, Grew:
		s += fmt.Sprintf(" at %d bytes", c.Off)
	case Unreadable:
		s += fmt.Sprintf(" at byte %d, %d bytes lost", c.Off, c.Lost)
	}
	if c.Err != nil {
		s += ": " + c.Err.Error()
	}
	return s
}

// ErrKept is the Err of a [Change] of kind Vanished or Replaced if lost+found is
// full: the file's names stay in the image and lead to an empty file.
var ErrKept = errors.New("kept as an empty file, for lost+found is full")

// ErrCrumbled is in the Err of a [Change] of kind Unreadable if readable parts of
// the file were given up because the image has no room to describe them all.
var ErrCrumbled = errors.New("too many pieces: readable parts between them were given up")

// damage is what reading made of the files, as far as it matters to the image.
type damage struct {
	p     *Plan
	files map[filetree.ID]*fileDamage
	lost  []filetree.ID // files for lost+found
	spare int64         // blocks of lost+found that become extent blocks
}

type fileDamage struct {
	size int64
	bad  []run // blocks of the file without data
	gone bool  // its names are left out
}

const lostPerBlock = dirSpace / 20 // entries as long as "#4294967295"

// lostFits tells whether lost+found has room for so many files beside so many extent blocks.
func lostFits(files int, spare int64) bool {
	return ceilDiv(int64(files)+2, lostPerBlock)+spare <= lostBlocks
}

func (d *damage) gone(id filetree.ID) bool {
	if len(d.lost) == 0 {
		return false
	}
	f := d.files[id]
	return f != nil && f.gone
}

// lose makes a file one without a name; false if lost+found is full.
func (d *damage) lose(id filetree.ID) bool {
	if !lostFits(len(d.lost)+1, d.spare) {
		return false
	}
	d.lost = append(d.lost, id)
	d.files[id].gone = true
	return true
}

// add records that a file has only size bytes, none of them in the bad ranges.
// The file's blocks begin at start. If the image has too few
// blocks to describe that, ranges are joined: then it returns false.
func (d *damage) add(id filetree.ID, f *fileDamage, start cursor) bool {
	whole := true
	x := d.p.fileExtents(nil, id, &start)
	planned := treeBlocks(int64(len(x)))
	for {
		more := treeBlocks(int64(len(spoil(x, f.bad)))) - planned
		if lostFits(len(d.lost)+1, d.spare+more) || more == 0 {
			d.spare += more
			break
		}
		whole = false
		if len(f.bad) > 1 {
			f.bad = joinNearest(f.bad)
		} else { // nothing kept: no more extents than planned
			f.bad = []run{{0, blocksOf(d.p.fileSize(id))}}
		}
	}
	d.files[id] = f
	return whole
}

// joinNearest halves the number of ranges by joining neighbours.
func joinNearest(bad []run) []run {
	var out []run
	for i := 0; i < len(bad); i += 2 {
		r := bad[i]
		if i+1 < len(bad) {
			r.n = bad[i+1].start + bad[i+1].n - r.start
		}
		out = append(out, r)
	}
	return out
}
