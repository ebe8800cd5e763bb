package boot

import (
	"bytes"
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

// TestMappable: what cannot be mapped is refused before the disk is taken.
func TestMappable(t *testing.T) {
	b := make([]byte, 1<<20)
	b[510], b[511] = 0x55, 0xaa
	b[446+4] = 5 // an extended partition
	b[446+8], b[446+12] = 8, 64
	if err := mappable(bytes.NewReader(b), int64(len(b))); !errors.Is(err, errNotLazy) || !errors.Is(err, errFinal) {
		t.Errorf("logical partitions: %v", err)
	}
	if err := mappable(iotestErr{}, 1<<20); err == nil || errors.Is(err, errNotLazy) || errors.Is(err, errFinal) {
		t.Errorf("a store that fails: %v", err)
	}
}

type iotestErr struct{}

func (iotestErr) ReadAt([]byte, int64) (int, error) { return 0, errors.New("no route") }

// TestMayMount: a disk that this instance fills is not mounted but through its
// server, whatever is at its head.
func TestMayMount(t *testing.T) {
	for _, c := range []struct {
		state    lazyroot.State
		instance string
		want     bool
	}{
		{lazyroot.None, "", true},
		{lazyroot.Filling, "i-1", false},
		{lazyroot.Filling, "i-2", true},
		{lazyroot.Complete, "i-1", true},
	} {
		if got := mayMount(lazyroot.Record{State: c.state, Instance: c.instance}, "i-1"); got != c.want {
			t.Errorf("%v for %q: %v", c.state, c.instance, got)
		}
	}
}

// TestTicketHolder: what is tried again within a boot is no claim more.
func TestTicketHolder(t *testing.T) {
	m := &machine{config: Config{Metadata: "http://127.0.0.1:1", AnyPort: true}.withDefaults()}
	first, err := m.ticketClient()
	check(t, err)
	again, err := m.ticketClient()
	check(t, err)
	if first.Holder() != again.Holder() {
		t.Error("each try is another holder of the ticket")
	}
}
