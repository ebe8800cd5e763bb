package systemd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	sd "github.com/coreos/go-systemd/v22/dbus"
	"github.com/godbus/dbus/v5"
)

// Conn is a connection to systemd, made again when it broke, as when the bus is
// started anew. Its methods may be called concurrently.
type Conn struct {
	ctx context.Context // connections end with it
	mu  sync.Mutex
	c   *sd.Conn
	end context.CancelFunc // of c
}

// Connect connects to systemd over the system bus, until ctx ends.
func Connect(ctx context.Context) (*Conn, error) {
	c := &Conn{ctx: ctx}
	_, err := c.live(ctx)
	return c, err
}

// Close closes the connection. One that is used after is made again.
func (c *Conn) Close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.drop()
}

// drop closes the connection there is; c.mu is held.
func (c *Conn) drop() {
	if c.c != nil {
		c.c.Close()
		c.end()
		c.c = nil
	}
}

// live is a connection that has not broken, as far as is known. Making one is
// given up when ctx ends.
func (c *Conn) live(ctx context.Context) (*sd.Conn, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.c != nil && c.c.Connected() {
		return c.c, nil
	}
	c.drop()
	// The connection is to outlive the one call that it is made for.
	own, end := context.WithCancel(c.ctx)
	stop := context.AfterFunc(ctx, end)
	made, err := sd.NewWithContext(own)
	if err == nil && !stop() {
		made.Close()
		err = context.Cause(ctx)
	}
	if err != nil {
		end()
		return nil, fmt.Errorf("talking to systemd: %w", err)
	}
	c.c, c.end = made, end
	return made, nil
}

// Reload makes systemd read its unit files anew.
func (c *Conn) Reload(ctx context.Context) error {
	s, err := c.live(ctx)
	if err != nil {
		return err
	}
	if err := s.ReloadContext(ctx); err != nil {
		return fmt.Errorf("reloading systemd's units: %w", err)
	}
	return nil
}

// Enable makes units start at boot, by their Install sections.
func (c *Conn) Enable(ctx context.Context, units ...string) error {
	s, err := c.live(ctx)
	if err != nil {
		return err
	}
	if _, _, err := s.EnableUnitFilesContext(ctx, units, false, true); err != nil {
		return fmt.Errorf("enabling %v: %w", units, err)
	}
	return nil
}

// Disable undoes Enable. A unit that is not there is no error.
func (c *Conn) Disable(ctx context.Context, units ...string) error {
	s, err := c.live(ctx)
	if err != nil {
		return err
	}
	for _, u := range units {
		if _, err := s.DisableUnitFilesContext(ctx, []string{u}, false); err != nil && !absent(err) {
			return fmt.Errorf("disabling %s: %w", u, err)
		}
	}
	return nil
}

// Start starts a unit and waits until it has started, or failed to.
func (c *Conn) Start(ctx context.Context, unit string) error {
	return c.wait(ctx, "starting "+unit, func(s *sd.Conn, done chan<- string) error {
		_, err := s.StartUnitContext(ctx, unit, "replace", done)
		return err
	})
}

// Stop stops a unit and waits until it has stopped. A unit that is not loaded
// is no error.
func (c *Conn) Stop(ctx context.Context, unit string) error {
	err := c.wait(ctx, "stopping "+unit, func(s *sd.Conn, done chan<- string) error {
		_, err := s.StopUnitContext(ctx, unit, "replace", done)
		return err
	})
	if absent(err) {
		return nil
	}
	return err
}

// stopLater asks for a unit to be stopped and does not wait.
func (c *Conn) stopLater(ctx context.Context, unit string) error {
	s, err := c.live(ctx)
	if err != nil {
		return err
	}
	if _, err := s.StopUnitContext(ctx, unit, "replace", nil); err != nil && !absent(err) {
		return fmt.Errorf("stopping %s: %w", unit, err)
	}
	return nil
}

// errBroke is how a job ends of which nothing more will be heard.
var errBroke = errors.New("the connection to systemd broke, and whether it came about is not known")

// wait runs a job of systemd to its end.
func (c *Conn) wait(ctx context.Context, what string, begin func(*sd.Conn, chan<- string) error) error {
	s, err := c.live(ctx)
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	done := make(chan string, 1)
	if err := begin(s, done); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	look := time.NewTicker(time.Second) // a connection that breaks says nothing to who waits for a job
	defer look.Stop()
	for {
		select {
		case r := <-done:
			if r != "done" && r != "skipped" {
				return fmt.Errorf("%s: systemd's job ended as %q; 'journalctl -u' and the unit's name may say why", what, r)
			}
			return nil
		case <-ctx.Done():
			return fmt.Errorf("%s: %w", what, ctx.Err())
		case <-look.C:
			if !s.Connected() {
				return fmt.Errorf("%s: %w", what, errBroke)
			}
		}
	}
}

// Active is a unit's ActiveState: "active", "inactive", "failed", "activating" …;
// that of a unit nobody knows is "inactive".
func (c *Conn) Active(ctx context.Context, unit string) (string, error) {
	return c.property(ctx, unit, "ActiveState")
}

func (c *Conn) property(ctx context.Context, unit, name string) (string, error) {
	live, err := c.live(ctx)
	if err != nil {
		return "", err
	}
	p, err := live.GetUnitPropertyContext(ctx, unit, name)
	if err != nil {
		return "", fmt.Errorf("asking for %s of %s: %w", name, unit, err)
	}
	s, ok := p.Value.Value().(string)
	if !ok {
		return "", fmt.Errorf("asking for %s of %s: it is no text", name, unit)
	}
	return s, nil
}

// Freeze makes all processes of a unit stand still, which they do when it
// returns. A frozen unit, or one that is not active, is no error.
func (c *Conn) Freeze(ctx context.Context, unit string) error {
	return c.freezer(ctx, unit, "frozen", (*sd.Conn).FreezeUnit)
}

// Thaw lets them go on. Likewise.
func (c *Conn) Thaw(ctx context.Context, unit string) error {
	return c.freezer(ctx, unit, "running", (*sd.Conn).ThawUnit)
}

func (c *Conn) freezer(ctx context.Context, unit, want string, do func(*sd.Conn, context.Context, string) error) error {
	active, err := c.Active(ctx, unit)
	if err != nil {
		return err
	}
	if active == "inactive" || active == "failed" {
		return nil
	}
	if now, err := c.property(ctx, unit, "FreezerState"); err == nil && now == want {
		return nil
	}
	s, err := c.live(ctx)
	if err != nil {
		return err
	}
	if err := do(s, ctx, unit); err != nil && !absent(err) {
		return fmt.Errorf("making %s %s: %w", unit, want, err)
	}
	return nil
}

// Run starts a transient unit and waits until it has started: what it runs is
// free of the agent's own confinement.
func (c *Conn) Run(ctx context.Context, unit string, properties ...Property) error {
	return c.wait(ctx, "starting "+unit, func(s *sd.Conn, done chan<- string) error {
		_, err := s.StartTransientUnitContext(ctx, unit, "fail", properties, done)
		return err
	})
}

// Property is a property of a unit, as systemd.exec(5) and its siblings name
// them, with a value of the type that org.freedesktop.systemd1(5) says.
type Property = sd.Property

// Prop makes a property.
func Prop(name string, value any) Property {
	return Property{Name: name, Value: dbus.MakeVariant(value)}
}

// Exec is the value of ExecStart and its siblings.
func Exec(argv ...string) any {
	return []struct {
		Path string
		Args []string
		Fail bool
	}{{argv[0], argv, false}}
}

// absent reports whether an error says that there is no such unit.
func absent(err error) bool {
	var e dbus.Error
	if !errors.As(err, &e) {
		return false
	}
	switch e.Name {
	case "org.freedesktop.systemd1.NoSuchUnit", "org.freedesktop.DBus.Error.FileNotFound":
		return true
	}
	return false
}

// exists reports whether an error says that a unit of this name is there.
func exists(err error) bool {
	var e dbus.Error
	return errors.As(err, &e) && e.Name == "org.freedesktop.systemd1.UnitExists"
}

// Inhibit takes logind's lock against something, as "shutdown:sleep", that
// holds until the file is closed, however its process ends. mode is "block"
// or "delay". why is shown to who is held up.
func Inhibit(ctx context.Context, what, why, mode string) (*os.File, error) {
	bus, err := dbus.ConnectSystemBus(dbus.WithContext(ctx))
	if err != nil {
		return nil, fmt.Errorf("talking to logind: %w", err)
	}
	defer bus.Close()
	var fd dbus.UnixFD
	err = bus.Object("org.freedesktop.login1", "/org/freedesktop/login1").
		CallWithContext(ctx, "org.freedesktop.login1.Manager.Inhibit", 0, what, "Instar", why, mode).Store(&fd)
	if err != nil {
		return nil, fmt.Errorf("asking logind to hold %s up: %w", what, err)
	}
	return os.NewFile(uintptr(fd), "inhibitor"), nil
}
