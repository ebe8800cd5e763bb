package boot

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path"
	"strconv"
	"strings"
	"time"

	"github.com/instar-image/instar/metadata/ticket"
)

// Files of the initrd that boot reads.
const (
	ConfigFile  = "/etc/instar/boot.json"
	ModulesFile = "/etc/instar/modules" // paths, one a line, in the order to load
	CAFile      = "/etc/instar/ca.pem"
)

// Policy is what happens after a step failed for good.
type Policy string

// Policies.
const (
	Retry    Policy = "retry"    // begin again with the network, after a pause, without end
	Reboot   Policy = "reboot"   // after a pause
	PowerOff Policy = "poweroff" // at once
	Halt     Policy = "halt"     // stay, with the reason on the console
	Shell    Policy = "shell"    // a shell on the console, if the initrd has and allows one
)

// Config is what the initrd was built with. Each field but AllowShell and
// KernelRelease has a kernel parameter "instar.<json name>=" that overrides it.
type Config struct {
	// Metadata is the base URL of the metadata server; default
	// http://169.254.169.254.
	Metadata string `json:"metadata,omitempty"`
	// Net is how the network is set up: dhcp (default), static, ra (IPv6
	// router advertisements), none.
	Net string `json:"net,omitempty"`
	// Interface is the interface to use, by name or MAC address; default:
	// every Ethernet interface is tried, the first that works is used.
	Interface string `json:"interface,omitempty"`
	// Address (with prefix length), Gateway and DNS (several by comma) are for
	// net=static; IPv4 or IPv6. DNS adds to what DHCP says.
	Address string `json:"address,omitempty"`
	Gateway string `json:"gateway,omitempty"`
	DNS     string `json:"dns,omitempty"`
	// KeepNet leaves the network as it is set up. Default: it is taken down
	// before the image's system starts, which names and configures interfaces
	// as it is used to.
	KeepNet bool `json:"keepnet,omitempty"`
	// Root is the filesystem that is the root: UUID=…, LABEL=…, PARTUUID=…,
	// PARTLABEL=…, /dev/…, or auto (default): the first one with a system in
	// it. With ticket the image that the launch ticket names is written to
	// Disk, once for the instance.
	Root string `json:"root,omitempty"`
	// Lazy is how an Instar image comes to the disk, whatever its ticket says:
	// eager, lazy (also "true"), lazy-or-eager. Default: what the ticket says, else
	// eager.
	Lazy ticket.Mode `json:"lazy,omitempty"`
	// Trace is "record" to have written down what the boot of a lazy root reads.
	Trace string `json:"trace,omitempty"`
	// Disk is the device that a ticket's image is written to, whatever it
	// holds; default the first disk, if it holds nothing that is known.
	Disk string `json:"disk,omitempty"`
	// AnyPort asks for the ticket from a source port of 1024 or above, which
	// only a private metadata server takes.
	AnyPort bool `json:"anyport,omitempty"`
	// Proxy is the URL of an HTTP proxy by which the image's store is reached;
	// the metadata server never is.
	Proxy string `json:"proxy,omitempty"`
	// Grow makes the root's filesystem as large as its device.
	Grow bool `json:"grow,omitempty"`
	// RootFlags are mount options for the root.
	RootFlags string `json:"rootflags,omitempty"`
	// Init is the program that the root's system starts with.
	Init string `json:"init,omitempty"`
	// Kexec goes on with the image's own kernel: the newest in its /boot with
	// "true", else the one of this release.
	Kexec string `json:"kexec,omitempty"`
	// Append are further kernel parameters for that kernel.
	Append string `json:"append,omitempty"`
	// User is the login user if the metadata does not say.
	User string `json:"user,omitempty"`
	// Fail is what to do when a step failed for good; default retry.
	Fail Policy `json:"fail,omitempty"`
	// Pause is the time before a retry or reboot, in seconds; default 10.
	Pause int `json:"pause,omitempty"`
	// Wait is how long, in seconds, the network and then the metadata server
	// are waited for; default 60 and 120.
	Wait int `json:"wait,omitempty"`
	// Patience multiplies the deadlines of all steps; default 1.
	Patience int `json:"patience,omitempty"`
	// Stop ends the boot after the step it names, for a trial.
	Stop string `json:"stop,omitempty"`

	// AllowShell lets instar.fail=shell open a shell. Who may edit the kernel's
	// parameters then owns the machine.
	AllowShell bool `json:"allowShell,omitempty"`
	// KernelRelease is the kernel whose modules are in the initrd.
	KernelRelease string `json:"kernelRelease,omitempty"`
}

// option is one kernel parameter.
type option struct {
	name string
	set  func(c *Config, v string) error
}

func text(field func(c *Config) *string) func(*Config, string) error {
	return func(c *Config, v string) error { *field(c) = v; return nil }
}

func number(field func(c *Config) *int) func(*Config, string) error {
	return func(c *Config, v string) (err error) { *field(c), err = strconv.Atoi(v); return err }
}

// options are the kernel parameters, without "instar.".
func options() []option {
	return []option{
		{"metadata", text(func(c *Config) *string { return &c.Metadata })},
		{"net", text(func(c *Config) *string { return &c.Net })},
		{"interface", text(func(c *Config) *string { return &c.Interface })},
		{"address", text(func(c *Config) *string { return &c.Address })},
		{"gateway", text(func(c *Config) *string { return &c.Gateway })},
		{"dns", text(func(c *Config) *string { return &c.DNS })},
		{"keepnet", func(c *Config, v string) (err error) { c.KeepNet, err = strconv.ParseBool(v); return err }},
		{"root", text(func(c *Config) *string { return &c.Root })},
		{"lazy", func(c *Config, v string) error { c.Lazy = lazyMode(v); return nil }},
		{"trace", text(func(c *Config) *string { return &c.Trace })},
		{"disk", text(func(c *Config) *string { return &c.Disk })},
		{"anyport", func(c *Config, v string) (err error) { c.AnyPort, err = strconv.ParseBool(v); return err }},
		{"proxy", text(func(c *Config) *string { return &c.Proxy })},
		{"grow", func(c *Config, v string) (err error) { c.Grow, err = strconv.ParseBool(v); return err }},
		{"rootflags", text(func(c *Config) *string { return &c.RootFlags })},
		{"init", text(func(c *Config) *string { return &c.Init })},
		{"kexec", text(func(c *Config) *string { return &c.Kexec })},
		{"append", text(func(c *Config) *string { return &c.Append })},
		{"user", text(func(c *Config) *string { return &c.User })},
		{"fail", func(c *Config, v string) error { c.Fail = Policy(v); return nil }},
		{"pause", number(func(c *Config) *int { return &c.Pause })},
		{"wait", number(func(c *Config) *int { return &c.Wait })},
		{"patience", number(func(c *Config) *int { return &c.Patience })},
		{"stop", text(func(c *Config) *string { return &c.Stop })},
	}
}

// lazyMode is the mode that a value of instar.lazy stands for.
func lazyMode(v string) ticket.Mode {
	switch v {
	case "true", "1":
		return ticket.Lazy
	case "false", "0":
		return ticket.Eager
	}
	return ticket.Mode(v)
}

// Parameters overrides c by the instar.* parameters of a kernel command line.
// An unknown one is an error, so that a misspelt one is not passed over.
func (c *Config) Parameters(cmdline string) error {
	var errs []error
	for _, word := range splitCmdline(cmdline) {
		if word == "--" {
			break // the rest is for the system's init
		}
		key, value, has := strings.Cut(word, "=")
		name, ours := strings.CutPrefix(key, "instar.")
		if !ours {
			continue
		}
		if !has {
			value = "true"
		}
		known := false
		for _, o := range options() {
			if o.name == name {
				known = true
				if err := o.set(c, value); err != nil {
					errs = append(errs, fmt.Errorf("kernel parameter %s: %q is not of its form", key, value))
				}
			}
		}
		if !known {
			errs = append(errs, fmt.Errorf("kernel parameter %s is unknown", key))
		}
	}
	return errors.Join(errs...)
}

// splitCmdline splits at blanks outside double quotes, which are removed, as
// the kernel does.
func splitCmdline(s string) []string {
	var words []string
	var word strings.Builder
	quoted, any := false, false
	for _, r := range s {
		switch {
		case r == '"':
			quoted, any = !quoted, true
		case !quoted && (r == ' ' || r == '\t' || r == '\n'):
			if any {
				words = append(words, word.String())
			}
			word.Reset()
			any = false
		default:
			word.WriteRune(r)
			any = true
		}
	}
	if any {
		words = append(words, word.String())
	}
	return words
}

// withDefaults fills in what is not said.
func (c Config) withDefaults() Config {
	for _, d := range []struct {
		field *string
		value string
	}{
		{&c.Metadata, "http://169.254.169.254"}, {&c.Net, "dhcp"}, {&c.Root, "auto"}, {&c.Init, "/sbin/init"},
	} {
		if *d.field == "" {
			*d.field = d.value
		}
	}
	if c.Fail == "" {
		c.Fail = Retry
	}
	if c.Pause == 0 {
		c.Pause = 10
	}
	if c.Patience == 0 {
		c.Patience = 1
	}
	return c
}

// Check says what is wrong with a configuration.
func (c Config) Check() error {
	d := c.withDefaults()
	var errs []error
	bad := func(name, value, want string) {
		errs = append(errs, fmt.Errorf("instar.%s: %q is not %s", name, value, want))
	}
	if u, err := url.Parse(d.Metadata); err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Host == "" {
		bad("metadata", d.Metadata, "an http or https URL")
	}
	if u, err := url.Parse(d.Proxy); d.Proxy != "" && (err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Host == "") {
		bad("proxy", d.Proxy, "an http or https URL")
	}
	switch d.Net {
	case "dhcp", "static", "ra", "none":
	default:
		bad("net", d.Net, "one of dhcp, static, ra, none")
	}
	if err := d.Lazy.Check(); err != nil {
		bad("lazy", string(d.Lazy), "true, false or lazy-or-eager")
	}
	if d.Trace != "" && d.Trace != "record" {
		bad("trace", d.Trace, "record")
	}
	if d.Net == "static" || d.Address != "" {
		if _, err := netip.ParsePrefix(d.Address); err != nil {
			bad("address", d.Address, "an address with a prefix length")
		}
	}
	if d.Gateway != "" {
		if _, err := netip.ParseAddr(d.Gateway); err != nil {
			bad("gateway", d.Gateway, "an address")
		}
	}
	if _, err := d.servers(); err != nil {
		bad("dns", d.DNS, "a list of addresses")
	}
	if !path.IsAbs(d.Init) {
		bad("init", d.Init, "an absolute path")
	}
	if strings.ContainsAny(d.Kexec, "/ \t") {
		bad("kexec", d.Kexec, "true or a kernel's release")
	}
	if d.Append != "" && d.Kexec == "" {
		errs = append(errs, errors.New("instar.append: only a kernel started by instar.kexec takes further parameters"))
	}
	switch d.Fail {
	case Retry, Reboot, PowerOff, Halt, Shell:
	default:
		bad("fail", string(d.Fail), "one of retry, reboot, poweroff, halt, shell")
	}
	if d.Fail == Shell && !d.AllowShell {
		errs = append(errs, errors.New("instar.fail: the initrd was not built to allow a shell"))
	}
	if d.Pause < 0 || d.Pause > 3600 {
		bad("pause", strconv.Itoa(d.Pause), "0 to 3600 seconds")
	}
	if d.Wait < 0 || d.Wait > 24*3600 {
		bad("wait", strconv.Itoa(d.Wait), "1 to 86400 seconds")
	}
	if d.Patience < 1 || d.Patience > 100 {
		bad("patience", strconv.Itoa(d.Patience), "1 to 100")
	}
	if d.Stop != "" && !isStep(d.Stop) {
		bad("stop", d.Stop, "a step")
	}
	return errors.Join(errs...)
}

func (c Config) servers() ([]netip.Addr, error) {
	var list []netip.Addr
	for s := range strings.SplitSeq(c.DNS, ",") {
		if s == "" {
			continue
		}
		a, err := netip.ParseAddr(s)
		if err != nil {
			return nil, err
		}
		list = append(list, a)
	}
	return list, nil
}

// matches tells whether the configuration lets the interface be used.
func (c Config) matches(name string, mac net.HardwareAddr) bool {
	return c.Interface == "" || c.Interface == name || strings.EqualFold(c.Interface, mac.String())
}

func (c Config) scaled(d time.Duration) time.Duration { return d * time.Duration(c.Patience) }

// limit is the deadline of a step.
func (c Config) limit(s step) time.Duration {
	if c.Wait > 0 && (s.name == "network" || s.name == "metadata") {
		return time.Duration(c.Wait) * time.Second
	}
	return c.scaled(s.deadline)
}

// readConfig reads what is built in and applies the kernel's parameters.
func readConfig(file, cmdline string) (Config, error) {
	var c Config
	data, err := os.ReadFile(file)
	if err != nil && !os.IsNotExist(err) {
		return c, err
	}
	if err == nil {
		dec := json.NewDecoder(bytes.NewReader(data))
		dec.DisallowUnknownFields()
		if err := dec.Decode(&c); err != nil {
			return c, fmt.Errorf("reading %s: %w", file, err)
		}
	}
	if err := c.Parameters(cmdline); err != nil {
		return c.withDefaults(), err
	}
	return c.withDefaults(), c.Check()
}
