package quiesce

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// planPath is where the capture leaves what it wants to stand still.
func planPath(dir, id string) string { return filepath.Join(dir, id+".plan") }

func socketPath(dir, id string) string { return filepath.Join(dir, id+".guard") }

func dial(ctx context.Context, dir, id string) (net.Conn, error) {
	return (&net.Dialer{}).DialContext(ctx, "unix", socketPath(dir, id))
}

// What a guard says, a line each; what follows a space is for people.
const (
	saysHeld   = "held"
	saysFailed = "failed"
	saysThawed = "thawed" // the filesystems, before it was asked for
	saysEnded  = "ended"  // everything, likewise
	saysUndone = "undone"
)

// Guard is the guard of one standstill, and returns when it is over. It is a
// process of its own: see the package's comment. ready is called when it waits
// for its capture, which has a minute to come.
//
// It ends with nothing standing still, whatever happens, or with an error that
// says what does.
func Guard(ctx context.Context, dir, id string, connect Connect, ready func() error) (err error) {
	data, err := os.ReadFile(planPath(dir, id))
	if err != nil {
		return fmt.Errorf("guarding: %w", err)
	}
	var p Plan
	if err := json.Unmarshal(data, &p); err != nil {
		return fmt.Errorf("guarding: %w", err)
	}
	if p.Limit <= 0 {
		p.Limit = DefaultLimit
	}
	path := socketPath(dir, id)
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("guarding: %w", err)
	}
	ln, err := (&net.ListenConfig{}).Listen(ctx, "unix", path)
	if err != nil {
		return fmt.Errorf("guarding: %w", err)
	}
	defer ln.Close()
	// Undoing is not to be broken off by what ends everything else.
	undo := func() error { return Undo(context.WithoutCancel(ctx), dir, id, connect) }
	if err := ready(); err != nil {
		return err
	}
	if err := ln.(*net.UnixListener).SetDeadline(time.Now().Add(time.Minute)); err != nil {
		return fmt.Errorf("guarding: %w", err)
	}
	c, err := ln.Accept()
	if err != nil {
		return fmt.Errorf("guarding: no capture came: %w", err)
	}
	defer c.Close()

	gone := make(chan struct{}) // the capture has hung up, or is dead
	go func() {
		defer close(gone)
		_, _ = io.Copy(io.Discard, c)
	}()
	begun := time.Now()
	bounded, cancel := context.WithTimeout(ctx, p.Limit)
	defer cancel()
	stop := make(chan struct{})
	go func() {
		select {
		case <-gone:
			cancel()
		case <-stop:
		}
	}()
	var thaw *time.Timer
	err = hold(bounded, dir, id, p, connect, func() {
		thaw = time.AfterFunc(FreezeLimit, func() {
			if terr := thawAll(p.Filesystems); terr == nil {
				say(c, saysThawed, fmt.Sprintf("the filesystems %s go on after %s: longer nothing is kept from writing", strings.Join(p.Filesystems, ", "), FreezeLimit))
			}
		})
	})
	if thaw != nil {
		defer thaw.Stop()
	}
	close(stop)
	if err != nil {
		err = errors.Join(err, undo())
		say(c, saysFailed, err.Error())
		return err
	}
	say(c, saysHeld, "")
	timer := time.NewTimer(time.Until(begun.Add(p.Limit)))
	defer timer.Stop()
	why := ""
	select {
	case <-gone:
	case <-timer.C:
		why = fmt.Sprintf("units and filesystems go on after %s, the limit that was set, before the capture is through", p.Limit)
	case <-ctx.Done():
		why = "units and filesystems go on: the guard was told to end"
	}
	if err := undo(); err != nil {
		say(c, saysFailed, err.Error())
		return err
	}
	if why != "" {
		say(c, saysEnded, why)
	}
	say(c, saysUndone, "")
	return nil
}

func say(c net.Conn, word, text string) {
	_ = c.SetWriteDeadline(time.Now().Add(time.Second)) // who does not listen is dead, or frozen
	_, _ = io.WriteString(c, word+" "+strings.ReplaceAll(text, "\n", "; ")+"\n")
}

// Hold is a standstill that a capture has asked for.
type Hold struct {
	dir, id string
	conn    *net.UnixConn
	connect Connect
	undone  chan error // how it ended
}

// Begin asks for a standstill and returns when everything stands still. start
// starts the guard and returns when the guard is ready. warn is told what goes
// on before it was asked for.
func Begin(ctx context.Context, dir, id string, p Plan, connect Connect, start func(context.Context) error, warn func(string)) (*Hold, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("making things stand still: %w", err)
	}
	data, err := json.Marshal(p)
	if err == nil {
		err = os.WriteFile(planPath(dir, id), data, 0o600)
	}
	if err != nil {
		return nil, fmt.Errorf("making things stand still: %w", err)
	}
	if err := start(ctx); err != nil {
		return nil, fmt.Errorf("starting the guard: %w", err)
	}
	c, err := dial(ctx, dir, id)
	if err != nil {
		return nil, fmt.Errorf("talking to the guard: %w", err)
	}
	h := &Hold{dir: dir, id: id, conn: c.(*net.UnixConn), connect: connect, undone: make(chan error, 1)}
	stop := context.AfterFunc(ctx, func() { h.conn.CloseWrite() })
	defer stop()
	lines := bufio.NewScanner(c)
	if lines.Scan() {
		word, text, _ := strings.Cut(lines.Text(), " ")
		if word == saysHeld && ctx.Err() == nil {
			go h.listen(lines, warn)
			return h, nil
		}
		if word == saysFailed {
			c.Close()
			return nil, fmt.Errorf("making things stand still: %s", text)
		}
	}
	h.conn.CloseWrite()
	go h.listen(lines, func(string) {})
	err = <-h.undone
	c.Close()
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	return nil, errors.Join(errors.New("making things stand still: the guard was killed"), err)
}

// listen takes the guard's words until it ends. A guard that ends without a
// word was killed: then this process undoes what stands still.
func (h *Hold) listen(lines *bufio.Scanner, warn func(string)) {
	for lines.Scan() {
		word, text, _ := strings.Cut(lines.Text(), " ")
		switch word {
		case saysUndone:
			h.undone <- nil
			return
		case saysFailed:
			h.undone <- errors.New(text)
			return
		default:
			warn(text)
		}
	}
	warn("the guard was killed: units and filesystems go on")
	h.undone <- Undo(context.Background(), h.dir, h.id, h.connect)
}

// End lets everything go on, and returns when it does.
func (h *Hold) End() error {
	h.conn.CloseWrite()
	err := <-h.undone
	h.conn.Close()
	_ = os.Remove(planPath(h.dir, h.id))
	_ = os.Remove(socketPath(h.dir, h.id))
	return err
}
