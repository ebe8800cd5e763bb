package ext4

import (
	"errors"
	"fmt"
	"iter"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/filetree"
)

// Errors of [Warning]s, beside those about extended attributes.
var (
	ErrTime     = errors.New("time outside 1901-2446: the nearest that ext4 has is stored")
	ErrDevice   = errors.New("device number larger than ext4 has: stored as 0:0")
	ErrFileSize = errors.New("file of 16 TiB or more: stored empty")
	ErrLinks    = errors.New("more than 65000 names: the others are left out")
	ErrCasefold = errors.New("directory ignored case: stored as one that does not")
)

// Warning tells of something in the tree that the image cannot have.
type Warning struct {
	ID  filetree.ID
	Err error // wraps one of the package's errors
}

// Warnings yields all that is known before any file is read, found by going
// through the tree again.
func (p *Plan) Warnings() iter.Seq[Warning] {
	return func(yield func(Warning) bool) {
		lost := map[int][]error{} // of sets
		for n := range p.sets {
			if l := packSet(p.t.Set(n)).lost; l != nil {
				lost[n] = l
			}
		}
		for i := range p.t.Len() {
			id := filetree.ID(i)
			for _, err := range append(p.warnings(id), lost[p.t.XattrSet(id)]...) {
				if !yield(Warning{id, err}) {
					return
				}
			}
		}
	}
}

func (p *Plan) warnings(id filetree.ID) (w []error) {
	const casefold = 0x40000000
	a := p.t.Attr(id)
	if a.Mtime.Sec < minTime || a.Mtime.Sec > maxTime {
		w = append(w, fmt.Errorf("%w: %d s since 1970", ErrTime, a.Mtime.Sec))
	}
	if p.t.Names(id) > maxLinks {
		w = append(w, ErrLinks)
	}
	switch a.Type() {
	case unix.S_IFREG:
		if a.Size > maxFileSize {
			w = append(w, ErrFileSize)
		}
	case unix.S_IFDIR:
		if a.Flags&casefold != 0 {
			w = append(w, ErrCasefold)
		}
	case unix.S_IFCHR, unix.S_IFBLK:
		if !deviceFits(a.Major, a.Minor) {
			w = append(w, fmt.Errorf("%w: %d:%d", ErrDevice, a.Major, a.Minor))
		}
	}
	return w
}
