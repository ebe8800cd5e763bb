package retention

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/upload/images"
)

// shelf is a store of images in memory that can be told to fail.
type shelf struct {
	list []images.Listed
	gone []string
	fail map[string]error
}

func (s *shelf) List(_ context.Context, prefix string) ([]images.Listed, error) {
	var out []images.Listed
	for _, l := range s.list {
		if strings.HasPrefix(l.Image+"/", prefix) {
			out = append(out, l)
		}
	}
	return out, nil
}

func (s *shelf) Delete(_ context.Context, ref string, _ keys.Signer) (*images.Deleted, error) {
	if err := s.fail[ref]; err != nil {
		return nil, err
	}
	s.gone = append(s.gone, ref)
	return &images.Deleted{}, nil
}

func version(n int) images.Version {
	v := images.Version{Manifest: &chunked.Manifest{
		Sequence: int64(n), Created: at("2024-01-01 00:00").Add(time.Duration(n) * 24 * time.Hour), Description: fmt.Sprint("day ", n),
	}}
	v.Name[0] = byte(n)
	return v
}

func ref(n int) string { return "web@" + version(n).Name.String() }

func newShelf() *shelf {
	listed := images.Listed{Image: "web"}
	for n := 5; n >= 1; n-- {
		listed.Versions = append(listed.Versions, version(n))
	}
	left := version(6)
	left.Unpublished = true
	listed.Versions = append(listed.Versions, left)
	other := images.Listed{Image: "web-2", Versions: listed.Versions}
	return &shelf{list: []images.Listed{listed, other}, fail: map[string]error{}}
}

func TestPrune(t *testing.T) {
	s := newShelf()
	var told []string
	o := PruneOptions{
		DryRun: true,
		Pinned: func(v images.Version) string {
			if v.Name[0] == 1 {
				return "tagged"
			}
			return ""
		},
		Report: func(d Decision) { told = append(told, fmt.Sprint(d.Sequence, d.Removed())) },
	}
	p := Policy{Last: 2}
	got, err := Prune(t.Context(), s, "web", p, nil, o)
	if err != nil || got.Removed != 2 || got.Kept != 3 || len(s.gone) != 0 {
		t.Fatalf("dry run: %+v, %v; deleted %q", got, err, s.gone)
	}
	if want := "1 false 2 true 3 true 4 false 5 false"; strings.Join(told, " ") != want {
		t.Errorf("told %q, want %q", told, want)
	}
	o.DryRun = false
	got, err = Prune(t.Context(), s, "web", p, nil, o)
	if err != nil || got.Removed != 2 || !slices.Equal(s.gone, []string{ref(2), ref(3)}) {
		t.Errorf("%+v, %v; deleted %q", got, err, s.gone)
	}
}

func TestPruneFailures(t *testing.T) {
	broken := errors.New("the store is broken")
	s := newShelf()
	s.fail[ref(2)] = broken
	s.fail[ref(3)] = images.ErrNoImage // somebody else has removed it
	got, err := Prune(t.Context(), s, "web", Policy{Last: 1}, nil, PruneOptions{})
	if !errors.Is(err, broken) || errors.Is(err, images.ErrNoImage) {
		t.Errorf("error %v", err)
	}
	if got.Removed != 3 || !slices.Equal(s.gone, []string{ref(1), ref(4)}) {
		t.Errorf("%+v; deleted %q", got, s.gone)
	}
	for _, spoil := range []func(*images.Listed){
		func(l *images.Listed) { l.Err = broken },
		func(l *images.Listed) { l.Versions[2].Err = broken },
	} {
		s := newShelf()
		spoil(&s.list[0])
		if _, err := Prune(t.Context(), s, "web", Policy{Last: 1}, nil, PruneOptions{}); !errors.Is(err, broken) || len(s.gone) > 0 {
			t.Errorf("error %v, deleted %q of what is not known", err, s.gone)
		}
	}
	if _, err := Prune(t.Context(), newShelf(), "web", Policy{Last: -1}, nil, PruneOptions{}); !errors.Is(err, ErrPolicy) {
		t.Errorf("invalid policy: %v", err)
	}
	if got, err := Prune(t.Context(), newShelf(), "none", Policy{Last: 1}, nil, PruneOptions{}); err != nil || got.Removed+got.Kept > 0 {
		t.Errorf("an image that is not there: %+v, %v", got, err)
	}
}
