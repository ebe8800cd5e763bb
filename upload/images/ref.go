package images

import (
	"fmt"
	"strings"

	"github.com/instar-image/instar/bundle/chunked"
)

// Ref says which image, and which version of it.
type Ref struct {
	Image   string
	Version string // first digits of the manifest's name, 4 to 64; "" is the newest
	Parents int    // so many versions further back
}

// minVersion is how few digits of a manifest's name may stand for it.
const minVersion = 4

// ParseRef reads NAME, NAME@DIGITS, NAME@parent, NAME@DIGITS.parent; parent may
// be repeated with dots between.
func ParseRef(s string) (Ref, error) {
	image, what, has := strings.Cut(s, "@")
	r := Ref{Image: image}
	if err := chunked.CheckImageName(image); err != nil {
		return Ref{}, fmt.Errorf("image %q: %w", s, err)
	}
	if !has {
		return r, nil
	}
	for i, word := range strings.Split(what, ".") {
		switch {
		case word == "parent":
			r.Parents++
		case i == 0 && len(word) >= minVersion && len(word) <= 64 && strings.Trim(word, "0123456789abcdef") == "":
			r.Version = word
		default:
			return Ref{}, fmt.Errorf("image %q: behind the @ comes a version, %d to 64 of its hex digits, or parent, or both as in NAME@0123.parent", s, minVersion)
		}
	}
	return r, nil
}

// String is what ParseRef reads.
func (r Ref) String() string {
	if r.Version == "" && r.Parents == 0 {
		return r.Image
	}
	words := make([]string, 0, 1+r.Parents)
	if r.Version != "" {
		words = append(words, r.Version)
	}
	for range r.Parents {
		words = append(words, "parent")
	}
	return r.Image + "@" + strings.Join(words, ".")
}

// pinned is the manifest that the reference names in full.
func (r Ref) pinned() (chunked.Name, bool) {
	n, err := chunked.ParseName(r.Version)
	return n, err == nil
}
