package boot

import (
	"errors"
	"strings"
	"testing"

	"github.com/instar-image/instar/initrd/lazyroot"
	"github.com/instar-image/instar/metadata/ticket"
)

// TestMode is who says how an image comes to the disk.
func TestMode(t *testing.T) {
	for _, c := range []struct {
		cmdline string
		ticket  ticket.Mode
		want    ticket.Mode
	}{
		{"", "", ticket.Eager},
		{"", ticket.Lazy, ticket.Lazy},
		{"", ticket.LazyOrEager, ticket.LazyOrEager},
		{"instar.lazy", ticket.Eager, ticket.Lazy},
		{"instar.lazy=false", ticket.Lazy, ticket.Eager},
		{"instar.lazy=lazy-or-eager", ticket.Lazy, ticket.LazyOrEager},
	} {
		config, err := readConfig("/nonexistent", c.cmdline)
		check(t, err)
		m := &machine{config: config}
		if got := m.mode(&ticket.Ticket{Mode: c.ticket}); got != c.want {
			t.Errorf("%q with %q in the ticket: %q, want %q", c.cmdline, c.ticket, got, c.want)
		}
	}
}

// TestNotLazy has what cannot come lazily refused before anything is changed, for
// a reason that a fallback to eager is for.
func TestNotLazy(t *testing.T) {
	img, _, err := newInstarStore(t).open(t, nil)
	check(t, err)
	size := img.identity("i-1").Size
	for _, c := range []struct {
		name, want string
		img        image
		disk       int64
		kexec      string
	}{
		{"an EC2 bundle", "one stream", &ec2Image{}, 1 << 40, ""},
		{"no room for the tail", "this image needs", img, size, ""},
		{"kexec", "instar.kexec", img, 1 << 40, "true"},
	} {
		m := &machine{config: Config{Kexec: c.kexec}}
		err := m.startLazy(t.Context(), device{Name: "none", Size: c.disk}, c.img, &ticket.Ticket{}, nil, lazyroot.Record{})
		if !errors.Is(err, errNotLazy) || !errors.Is(err, errFinal) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}
