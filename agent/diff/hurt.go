package diff

import (
	"cmp"
	"slices"

	"github.com/instar-image/instar/bundle/ext4"
)

// Span is a range of a disk, in bytes.
type Span struct{ From, To int64 }

// Hurt names the files of an image some of whose data lie in damaged ranges of
// its disk, by all their names. offset is where the filesystem begins on the disk,
// in bytes. Spans do not overlap. rest is how many bytes of them are no file's: the
// filesystem's own, which may be about any file, or nobody's.
func Hurt(l *ext4.Layout, offset int64, spans []Span) (names []string, rest int64) {
	spans = slices.Clone(spans)
	slices.SortFunc(spans, func(a, b Span) int { return cmp.Compare(a.From, b.From) })
	for _, s := range spans {
		rest += s.To - s.From
	}
	inodes := map[uint32]bool{}
	for f := range l.Files() {
		hurt := f.Link && inodes[f.Ino]
		for _, d := range f.Data {
			from, to := offset+d.Pos, offset+d.Pos+d.Len
			i, _ := slices.BinarySearchFunc(spans, from, func(s Span, at int64) int {
				if s.To <= at {
					return -1
				}
				return 1
			})
			for ; i < len(spans) && spans[i].From < to; i++ {
				rest -= min(to, spans[i].To) - max(from, spans[i].From)
				hurt = true
			}
		}
		if hurt {
			inodes[f.Ino] = true
			names = append(names, f.Path)
		}
	}
	return names, max(rest, 0)
}
