package ext4

import (
	"bytes"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/filetree"
)

// Standing says what a parent knows of a regular file.
type Standing uint8

// Standings of files.
const (
	Changed  Standing = iota // it is new, or differs
	Doubtful                 // it looks the same, but was written to when the parent was captured
	Same                     // it is the same file, unchanged
)

// Origin says that Len bytes of a file, whole blocks, lie in the parent's image at Pos.
type Origin struct {
	Off, Pos, Len int64
}

// Matches are the files of a plan that its parent knows. It takes nine bytes an inode.
type Matches struct {
	p        *Plan
	standing []Standing
	s        places
}

// doubt is how long before a scan began a file may have been written without
// its being sure that its times tell, in seconds: two for filesystems with
// times as coarse as that.
const doubt = 2

// Recognise compares the regular files of the plan's tree with those of a
// parent. A file is the same if it has a name in common with one that had the
// same size, modification and change time, filesystem and inode, the same
// holes, and whose content is not in doubt. Whether the plan keeps anything of the
// parent's places does not matter.
func (p *Plan) Recognise(parent *Layout) *Matches {
	m := &Matches{p: p, standing: make([]Standing, p.t.Len()), s: places{where: make([]int64, p.t.Len())}}
	limit := parent.header.started.Sec - doubt
	p.compare(parent, nil, func(id filetree.ID, r *record) {
		if !r.facts || m.standing[id] != Changed {
			return
		}
		a := p.t.Attr(id)
		if a.Size != r.size || a.Mtime != r.mtime || a.Ctime != r.ctime || p.device(id) != r.dev || a.Ino != r.host || !p.sameShape(id, r) {
			return
		}
		m.standing[id] = Same
		// The change time says it alone: writing sets both, and who then sets the
		// modification time, to the future perhaps, sets the change time to now.
		if a.Ctime.Sec >= limit {
			m.standing[id] = Doubtful
		}
		m.s.put(id, r.runs)
	})
	return m
}

// Standing is that of a regular file; of other inodes it is Changed.
func (m *Matches) Standing(id filetree.ID) Standing { return m.standing[id] }

// Origin says where in the parent's image the data of a file lie, ascending by
// the offset in the file; what is not there is a hole in both. It is nil for
// files that changed and for those without data.
func (m *Matches) Origin(id filetree.ID) []Origin {
	if m.standing[id] == Changed || !m.s.has(id) {
		return nil
	}
	var pieces []run
	for at, n := range m.p.pieces(id) {
		pieces = append(pieces, run{at, n})
	}
	return origins(nil, pieces, m.s.runs(nil, id, length(pieces)))
}

// device tells the filesystem of an inode from others: 0 is the root's, whose
// device number may be another after a restart, and always is of a snapshot.
func (p *Plan) device(id filetree.ID) uint64 {
	d := p.t.Attr(id).Dev
	if d == p.t.Attr(filetree.Root).Dev {
		return 0
	}
	return d + 1
}

// sameShape tells whether a file has data in the same blocks as an entry's.
func (p *Plan) sameShape(id filetree.ID, r *record) bool {
	i := 0
	for start, n := range p.pieces(id) {
		if i == len(r.pieces) || r.pieces[i] != (run{start, n}) {
			return false
		}
		i++
	}
	return i == len(r.pieces)
}

// compare goes through the names that the plan's tree and a layout have in
// common, of files of one type. It tells of each directory where its blocks
// were, if dir is not nil, and calls file for each name of anything with its
// entry, the first one if the inode had several names. An inode may be told
// of more than once.
func (p *Plan) compare(l *Layout, dir func(id filetree.ID, runs, trees []run), file func(filetree.ID, *record)) {
	named := map[uint32]*record{}
	w := newLayoutWalk(l, filetree.Root)
	for w.directory() {
		if w.id != filetree.None && dir != nil {
			dir(w.id, w.runs, w.trees)
		}
		meet := func(id filetree.ID) {
			r := &w.rec
			if r.names {
				named[r.ino] = r.clone()
			}
			if r.mode == 0 && id != filetree.None {
				r = named[r.ino]
			}
			if r.mode == unix.S_IFDIR {
				if id != filetree.None && !isDir(p.t.Mode(id)) {
					id = filetree.None
				}
				w.descend(id)
			}
			if id != filetree.None && r.mode == p.t.Mode(id)&unix.S_IFMT {
				file(id, r)
			}
		}
		more := w.next()
		if w.id != filetree.None {
			for name, id := range p.t.Children(w.id) {
				for more && bytes.Compare(w.rec.name, name) < 0 {
					meet(filetree.None)
					more = w.next()
				}
				if !more {
					break
				}
				if bytes.Equal(w.rec.name, name) {
					meet(id)
					more = w.next()
				}
			}
		}
		for more {
			meet(filetree.None)
			more = w.next()
		}
	}
}

func (r *record) clone() *record {
	c := *r
	c.name = nil
	c.pieces, c.runs, c.trees = slices.Clone(r.pieces), slices.Clone(r.runs), slices.Clone(r.trees)
	return &c
}

// Started is when the scan began that the layout's image was made of.
func (l *Layout) Started() filetree.Time { return l.header.started }
