package ui

import (
	"fmt"
	"io"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/term"
)

// Progress counts bytes towards a total and shows them: a line that is drawn
// again and again on a terminal, an object a second with JSON, nothing else.
// Its methods may be called concurrently, and on a nil Progress.
type Progress struct {
	p     *Printer
	label string
	total atomic.Int64
	done  atomic.Int64
	start time.Time
	stop  chan struct{}
	ended chan struct{}
	rate  float64 // bytes a second, smoothed; of the drawing goroutine
	last  int64
	at    time.Time
}

// Progress begins to show progress towards total bytes (0: not known). Any
// earlier one must have been ended.
func (p *Printer) Progress(label string, total int64) *Progress {
	if p.o.OnProgress != nil {
		p.o.OnProgress(label, total)
	}
	g := &Progress{p: p, label: label, start: time.Now(), stop: make(chan struct{}), ended: make(chan struct{})}
	g.total.Store(total)
	g.at = g.start
	every := time.Second
	switch {
	case p.o.JSON:
	case p.o.Quiet || !p.terminal:
		close(g.ended)
		return g
	default:
		every = 200 * time.Millisecond
	}
	go g.run(every)
	return g
}

// Add counts n more bytes.
func (g *Progress) Add(n int64) {
	if g != nil {
		g.done.Add(n)
	}
}

// Total corrects the total.
func (g *Progress) Total(n int64) {
	if g != nil {
		g.total.Store(n)
	}
}

// Done is the number of bytes counted.
func (g *Progress) Done() int64 {
	if g == nil {
		return 0
	}
	return g.done.Load()
}

// End stops showing it. It may be called once.
func (g *Progress) End() {
	if g == nil {
		return
	}
	close(g.stop)
	<-g.ended
}

func (g *Progress) run(every time.Duration) {
	defer close(g.ended)
	t := time.NewTicker(every)
	defer t.Stop()
	for {
		select {
		case <-g.stop:
			g.p.mu.Lock()
			g.p.clear()
			g.p.mu.Unlock()
			return
		case now := <-t.C:
			g.draw(now)
		}
	}
}

func (g *Progress) draw(now time.Time) {
	done, total := g.done.Load(), g.total.Load()
	if dt := now.Sub(g.at).Seconds(); dt > 0 {
		r := float64(done-g.last) / dt
		if g.rate == 0 {
			g.rate = r
		}
		// about five seconds of memory, whatever the interval
		k := min(1, dt/5)
		g.rate += (r - g.rate) * k
		g.last, g.at = done, now
	}
	g.p.mu.Lock()
	defer g.p.mu.Unlock()
	if g.p.o.JSON {
		f := Fields{"phase": g.label, "bytes_done": done, "bytes_per_second": int64(g.rate), "seconds": int64(now.Sub(g.start).Seconds())}
		if total > 0 {
			f["bytes_total"] = total
			if g.rate > 0 && total > done {
				f["seconds_left"] = int64(float64(total-done) / g.rate)
			}
		}
		_ = g.p.object(g.p.o.Stderr, "progress", f)
		return
	}
	line := fmt.Sprintf("%s  %s", g.label, Size(done))
	if total > 0 {
		line = fmt.Sprintf("%s  %3d%%  %s of %s", g.label, min(100, done*100/total), Size(done), Size(total))
	}
	line += fmt.Sprintf("  %s/s", Size(int64(g.rate)))
	if g.rate > 0 && total > done {
		line += "  " + clock(time.Duration(float64(total-done)/g.rate)*time.Second) + " left"
	}
	if f, ok := g.p.o.Stderr.(*os.File); ok {
		if w, _, err := term.GetSize(int(f.Fd())); err == nil && len(line) >= w && w > 1 {
			line = line[:w-1]
		}
	}
	_, _ = io.WriteString(g.p.o.Stderr, "\r\x1b[K"+line)
	g.p.drawn = true
}

// clear wipes the progress line, if one is drawn, for other text.
func (p *Printer) clear() {
	if p.drawn {
		_, _ = io.WriteString(p.o.Stderr, "\r\x1b[K")
		p.drawn = false
	}
}

// Size writes a number of bytes for people: "1.4 GiB".
func Size(n int64) string {
	const units = "KMGTPE"
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	v, i := float64(n)/1024, 0
	for v >= 1023.95 && i < len(units)-1 {
		v /= 1024
		i++
	}
	return strings.TrimSuffix(fmt.Sprintf("%.1f", v), ".0") + " " + units[i:i+1] + "iB"
}

// clock writes a duration as 1:02:03 or 2:03.
func clock(d time.Duration) string {
	s := int(d.Seconds())
	if s >= 3600 {
		return fmt.Sprintf("%d:%02d:%02d", s/3600, s/60%60, s%60)
	}
	return fmt.Sprintf("%d:%02d", s/60, s%60)
}
