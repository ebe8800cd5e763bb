package boot_test

import (
	"bytes"
	"fmt"
	"net/http"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/instar-image/instar/bundle/disk"
	"github.com/instar-image/instar/initrd/internal/qemutest"
)

// faulty makes a store fail in ways that a root survives, when so many bytes were
// given.
type faulty struct {
	*lazyCloud
	down        time.Duration // from the first request on that comes after 6 MiB
	lies        int           // so many answers, from 4 MiB on: of one range, for a single lie is not worth an alarm
	lied        string        // that range
	expire      []int64       // then its URLs do
	never       int64         // from then on all is wrong
	until       time.Time
	claims, end int // wanted: claims at least, completions
}

// start sets the faults up.
func (f *faulty) start() {
	f.reached = func(served int64) {
		if len(f.expire) > 0 && served > f.expire[0] {
			f.expire = f.expire[1:]
			f.stamp++
		}
	}
	f.wrong = func(w http.ResponseWriter, r *http.Request) bool {
		f.mu.Lock()
		defer f.mu.Unlock()
		if f.down > 0 && f.until.IsZero() && f.served > 6<<20 {
			f.until = time.Now().Add(f.down)
		}
		if time.Now().Before(f.until) {
			if conn, _, err := w.(http.Hijacker).Hijack(); err == nil {
				conn.Close()
			}
			return true
		}
		if !strings.Contains(r.URL.Path, "/packs/") {
			return false
		}
		asked := r.URL.Path + r.Header.Get("Range")
		var first, last int
		n, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-%d", &first, &last)
		switch {
		case n != 2 || err != nil:
			return false
		case f.never > 0 && f.served > f.never:
		case f.lies > 0 && f.served > 4<<20 && (f.lied == "" || f.lied == asked):
			f.lies--
			f.lied = asked
		default:
			return false
		}
		w.WriteHeader(http.StatusPartialContent)
		w.Write(bytes.Repeat([]byte("lies"), (last-first+4)/4)[:last-first+1])
		return true
	}
}

// TestBootLazyFaults has everything go wrong that a root can survive; and has the
// store give nothing right any more, which what is on the disk survives.
func TestBootLazyFaults(t *testing.T) {
	kernel, file := lazyInitrd(t)
	sum := regexp.QuoteMeta(bigSum())
	const filled = " guest.sum=/big guest.complete guest.log"
	type fault struct {
		name, memory, params string
		kind                 disk.Kind
		faulty               faulty
		want                 []string
	}
	faults := []fault{
		{
			name: "store down and wrong and URLs expire", params: filled,
			faulty: faulty{down: 5 * time.Second, lies: 2, expire: []int64{4 << 20, 7 << 20}, claims: 3, end: 1},
			want:   []string{sum, `the store closed the connection; trying again`, `ALARM: store: `, `refuses the ticket's URL`},
		},
		{
			name: "GPT with little memory", kind: disk.GPT, memory: "256", params: "guest.memory=120 guest.write=much:8000 guest.use" + filled,
			faulty: faulty{end: 1}, want: []string{`root: /dev/mapper/instar-root1, ext4`, sum},
		},
		{
			name: "wrong for ever", params: "guest.sum=/big guest.write=after:100 guest.log",
			faulty: faulty{never: 6 << 20},
			want:   []string{`GUEST sum /big: [0-9a-f]{64} read /big: input/output error`, `GUEST write: <nil>`, `ALARM: store: `},
		},
	}
	if os.Getenv("INSTAR_EVIDENCE") != "" {
		faults = append(
			faults,
			fault{name: "store down for a minute", params: filled, faulty: faulty{down: time.Minute, end: 1}, want: []string{sum}},
			fault{name: "wrong bytes", params: filled, faulty: faulty{lies: 4, end: 1}, want: []string{sum, `ALARM: store: `}},
			fault{name: "URLs expire twice", params: filled, faulty: faulty{expire: []int64{4 << 20, 8 << 20}, claims: 3, end: 1}, want: []string{sum}},
			fault{name: "MBR", kind: disk.MBR, params: filled, faulty: faulty{end: 1}, want: []string{`root: /dev/mapper/instar-root1, ext4`, sum}},
		)
	}
	for _, f := range faults {
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			if f.kind == "" {
				f.kind = disk.None
			}
			c := newLazyCloud(t, f.kind)
			f.faulty.lazyCloud = c
			f.faulty.start()
			target := dirty(t)
			out := qemutest.Run(t, qemutest.Guest{
				Kernel: kernel, Initrd: file, Memory: f.memory, Args: append(qemutest.UserNet(), qemutest.Disk(target)...),
				Append: c.serve(t, "i-1") + "guest.lazy guest.write=first:300 " + f.params,
			}, nil)
			if strings.Contains(f.params, "guest.use") {
				modest(t, out)
			}
			want := append(f.want, `GUEST write: <nil>`, `GUEST done`)
			if f.faulty.end > 0 {
				want = append(want, `GUEST processes: map\[\]`)
			}
			for _, want := range want {
				if !regexp.MustCompile(want).MatchString(out) {
					t.Errorf("the console lacks %q", want)
				}
			}
			if strings.Contains(out, "I/O error") != (f.faulty.never > 0) {
				t.Error("there was an I/O error, or none")
			}
			if c.claims < f.faulty.claims || c.complete != f.faulty.end {
				t.Errorf("%d claims, completed %d times", c.claims, c.complete)
			}
			if f.faulty.end > 0 {
				c.whole(t, target, map[string]int{"var/lib/first": 300})
			}
			if t.Failed() {
				t.Log(out)
			}
		})
	}
}
