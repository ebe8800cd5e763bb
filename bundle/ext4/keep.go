package ext4

import (
	"errors"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/filetree"
)

// ErrScattered is returned by [Plan.Write] for a plan that keeps its parent's
// places: there new files' data may lie after the metadata that tell of them.
var ErrScattered = errors.New("an image that keeps its parent's places cannot be written in one pass by ascending position")

// kept are the places of a plan that keeps those of its parent: 16 bytes an inode.
type kept struct {
	*places
	ino   []uint32              // by inode of the tree
	ids   []filetree.ID         // by number of inode, as far as used
	used  bitset                // inodes, counted from 0
	total uint32                // of them
	ranks map[int][]filetree.ID // the inodes of sets that have several blocks
}

// Beyond these, of which a parent's layout may speak as it likes, nothing is
// kept: they bound the memory that is taken.
const (
	maxKeptSize = 4 << 40 // bytes of the image: 128 MiB of bitmap
	sparseInos  = 8       // inode numbers for each inode of the tree
	spareInos   = 1 << 16 // and so many more
)

// maxDirRuns is in how many runs the blocks of a directory may lie.
const maxDirRuns = 16

// keep lays the plan out in the places of a parent: what is there still keeps
// its inode and, if it takes the same blocks, those; what is new gets what is
// free, the files of a directory beside each other where there is room. It
// returns false, and leaves the plan as it was, if the options ask for another
// filesystem, or the parent's has too little room left.
func (p *Plan) keep(l *Layout, o *Options) bool {
	h := &l.header
	if p.manyLinks || h.size > maxKeptSize || p.uuid != h.uuid || o.Size != 0 && o.Size != h.size ||
		o.JournalBlocks != 0 && o.JournalBlocks != h.journal {
		return false
	}
	k := &keeper{p: p, l: l}
	if !k.fixed() || o.Inodes > k.g.inodes() || !k.claimAll() || !k.inodes() || !k.fill() || !k.roomy(o) {
		return false
	}
	p.g, p.kept, p.size = k.g, k.k, h.size
	if o.Created == 0 {
		p.created = h.created
	}
	return true
}

// keeper finds the places of a plan by those of its parent.
type keeper struct {
	p    *Plan
	l    *Layout
	g    geometry
	k    *kept
	free *freeRuns
}

// fixed makes the parent's geometry.
func (k *keeper) fixed() bool {
	h := &k.l.header
	g := newGeometry(h.blocks, h.ipg*ceilDiv(h.blocks, groupBlocks), 1, h.journal)
	if g.blocks != h.blocks || g.ipg != h.ipg {
		return false
	}
	c := g.front()
	g.extents, g.lost, g.tables = h.extents, h.lost, h.tables
	if c.at > g.blocks || min(g.extents, g.lost, g.tables) < c.at {
		return false
	}
	g.bits = newBitset(g.blocks)
	g.bits.add(0, c.at)
	for _, s := range g.supers {
		g.bits.add(s, min(s+g.supersLen, g.blocks))
	}
	journal := g.cursor(g.journalAt)
	ok := true
	take := func(runs ...run) {
		for _, r := range runs {
			ok = ok && r.start+r.n <= g.blocks && g.bits.none(r.start, r.start+r.n)
			if ok {
				g.bits.add(r.start, r.start+r.n)
			}
		}
	}
	c = g.cursor(g.extents)
	take(c.taken(nil, treeBlocks(countExtents(&journal, g.journal)))...)
	c = g.cursor(g.lost)
	take(c.taken(nil, lostBlocks)...)
	c = g.cursor(g.tables)
	for range g.groups {
		at, _ := c.whole(g.tableLen())
		take(at)
	}
	k.g = g
	return ok
}

// claim takes runs of blocks if all of them are free.
func (k *keeper) claim(runs []run) bool {
	b := k.g.bits
	for i, r := range runs {
		if !b.none(r.start, r.start+r.n) {
			for _, r := range runs[:i] {
				b.remove(r.start, r.start+r.n)
			}
			return false
		}
		b.add(r.start, r.start+r.n)
	}
	return true
}

func (k *keeper) claimIno(ino uint32) bool {
	at := int64(ino) - 1
	if at >= min(k.g.inodes(), sparseInos*int64(len(k.k.ino))+spareInos) || !k.k.used.none(at, at+1) {
		return false
	}
	k.k.used.add(at, at+1)
	return true
}

// claimAll takes all places that are kept.
func (k *keeper) claimAll() bool {
	p, t := k.p, k.p.t
	k.k = &kept{places: newPlaces(p), ino: make([]uint32, t.Len()), used: newBitset(k.g.inodes())}
	s := k.k
	s.used.add(0, firstIno)
	s.ino[filetree.Root] = 2
	if p.lost != filetree.None {
		s.ino[p.lost] = firstIno
	}
	tree := func(id filetree.ID, extents int64, trees []run) {
		if n := treeBlocks(extents); n > 0 && length(trees) == n && k.claim(trees) {
			s.trees[id] = slices.Clone(trees)
		}
	}
	k.claimSets()
	p.compare(k.l, func(id filetree.ID, runs, trees []run) {
		n := int64(p.dirs[s.dirNr(id)].blocks)
		if length(runs) == n && len(runs) <= maxDirRuns && !s.has(id) && k.claim(runs) {
			s.put(id, runs)
			tree(id, extentsIn([]run{{0, n}}, runs), trees)
		}
	}, func(id filetree.ID, r *record) {
		if s.ino[id] == 0 && k.claimIno(r.ino) {
			s.ino[id] = r.ino
		}
		switch {
		case r.mode == unix.S_IFREG && len(r.runs) > 0 && !s.has(id) && p.sameShape(id, r) && k.claim(r.runs):
			s.put(id, r.runs)
			tree(id, extentsIn(r.pieces, r.runs), r.trees)
		case r.mode == unix.S_IFLNK && p.slowLink(id) && len(r.runs) == 1 && !s.has(id) && k.claim(r.runs):
			s.put(id, r.runs)
		}
	})
	return true
}

// claimSets takes the places of attributes that lie outside the inodes.
func (k *keeper) claimSets() {
	was := map[[16]byte]*layoutSet{}
	for i := range k.l.header.sets {
		s := &k.l.header.sets[i]
		was[s.digest] = s
	}
	for i := range k.p.sets {
		plan, set := &k.p.sets[i], &k.k.sets[i]
		set.values = make([]layoutValue, plan.values)
		if plan.blocks == 0 {
			continue
		}
		w := was[k.p.setDigest(i)]
		if w == nil {
			continue
		}
		if length(w.blocks) == int64(plan.blocks) && k.claim(w.blocks) {
			set.blocks = w.blocks
		}
		if len(w.values) != int(plan.values) {
			continue
		}
		for j, x := range packSet(k.p.t.Set(i)).values {
			v := w.values[j]
			if v.ino > firstIno && k.claimIno(v.ino) {
				set.values[j].ino = v.ino
			}
			if length(v.runs) == blocksOf(int64(len(x.value))) && k.claim(v.runs) {
				set.values[j].runs = v.runs
			}
		}
	}
}

// inodes gives numbers to the inodes that have none.
func (k *keeper) inodes() bool {
	s, end := k.k, k.g.inodes()
	at := int64(firstIno)
	next := func(ino *uint32) bool {
		if *ino != 0 {
			return true
		}
		if at = s.used.next(at, end, false); at == end {
			return false
		}
		s.used.add(at, at+1)
		*ino = uint32(at + 1)
		return true
	}
	for i := range s.ino {
		if !next(&s.ino[i]) {
			return false
		}
	}
	for i := range s.sets {
		for j := range s.sets[i].values {
			if !next(&s.sets[i].values[j].ino) {
				return false
			}
		}
	}
	s.total = uint32(s.used.count(0, end))
	s.ids = make([]filetree.ID, s.used.last(0, end)+2)
	for i := range s.ids {
		s.ids[i] = filetree.None
	}
	for i, ino := range s.ino {
		s.ids[ino] = filetree.ID(i)
	}
	s.ranks = map[int][]filetree.ID{}
	for i := range k.p.t.Len() {
		id := filetree.ID(i)
		if n := k.p.t.XattrSet(id); k.p.sets[n].blocks > 1 {
			s.ranks[n] = append(s.ranks[n], id)
		}
	}
	return true
}

// fill finds room for what has none.
func (k *keeper) fill() bool {
	p, s, t := k.p, k.k, k.p.t
	k.free = newFreeRuns(k.g.bits, 0, k.g.blocks)
	ok := true
	take := func(n int64) []run {
		if r, found := k.free.take(n); found {
			return []run{r}
		}
		runs, found := k.free.pieces(n)
		ok = ok && found
		return runs
	}
	lacks := func(id filetree.ID, typ uint32) int64 {
		if t.Mode(id)&unix.S_IFMT != typ || s.has(id) {
			return 0
		}
		return p.blockCount(s.places, id)
	}
	apart := filetree.None // a directory whose files did not fit beside each other
	for i := 0; i < t.Len() && ok; i++ {
		id := filetree.ID(i)
		n := lacks(id, unix.S_IFREG)
		if n == 0 {
			continue
		}
		dir, all := t.Parent(id), n
		if dir == apart {
			s.put(id, take(n))
			continue
		}
		last := id
		for next := id + 1; int(next) < t.Len() && t.Parent(next) == dir; next++ {
			if n := lacks(next, unix.S_IFREG); n > 0 {
				all += n
				last = next
			}
		}
		r, found := k.free.take(all)
		if !found {
			apart = dir
			s.put(id, take(n))
			continue
		}
		for ; id <= last; id++ {
			if n := lacks(id, unix.S_IFREG); n > 0 {
				s.put(id, []run{{r.start, n}})
				r.start += n
			}
		}
		i = int(last)
	}
	for i := range s.sets {
		set := &s.sets[i]
		if n := int64(p.sets[i].blocks); n > 0 && set.blocks == nil {
			set.blocks = take(n)
		}
		if len(set.values) == 0 {
			continue
		}
		for j, x := range packSet(t.Set(i)).values {
			if v := &set.values[j]; v.runs == nil {
				v.runs = take(blocksOf(int64(len(x.value))))
			}
		}
	}
	for i := range t.Len() {
		id := filetree.ID(i)
		for _, typ := range []uint32{unix.S_IFLNK, unix.S_IFDIR} {
			if n := lacks(id, typ); n > 0 && ok {
				s.put(id, take(n))
			}
		}
	}
	var x []extent
	for i := range t.Len() {
		id := filetree.ID(i)
		typ := t.Mode(id) & unix.S_IFMT
		if !ok || s.trees[id] != nil || typ != unix.S_IFREG && typ != unix.S_IFDIR {
			continue
		}
		x = p.extentsAt(x[:0], s.places, id)
		if n := treeBlocks(int64(len(x))); n > 0 {
			s.trees[id] = take(n)
		}
	}
	if !ok {
		return false
	}
	for _, r := range k.free.runs {
		k.g.unused += r.n
	}
	k.g.bits.add(0, k.g.blocks)
	for _, r := range k.free.runs {
		k.g.bits.remove(r.start, r.start+r.n)
	}
	return true
}

// roomy tells whether the image has half of the headroom it would be given anew.
func (k *keeper) roomy(o *Options) bool {
	g := &k.g
	g.setReserved(o)
	if o.Size != 0 {
		return true
	}
	headroom := blocksOf(max(o.Headroom, 0))
	if o.Headroom == 0 {
		headroom = max(128<<20/BlockSize, (g.blocks-g.unused)/10)
	}
	return g.unused-g.reserved >= headroom/2
}

// extentsAt appends the extents of a regular file or directory.
func (p *Plan) extentsAt(x []extent, s *places, id filetree.ID) []extent {
	n := p.blockCount(s, id)
	if n == 0 {
		return x
	}
	c := cursor{runs: s.runs(nil, id, n)}
	if isDir(p.t.Mode(id)) {
		return appendExtents(x, &c, 0, n)
	}
	return p.fileExtents(x, id, &c)
}
