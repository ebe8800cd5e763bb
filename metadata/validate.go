package metadata

import (
	"encoding/base64"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"path"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/instar-image/instar/upload/cache/cacheclient"
)

// MaxUserData is the most user data an instance can have, in bytes, as on EC2.
const MaxUserData = 16384

// Problem is one thing wrong with a record. Path is the key it is about, as
// "interfaces[0].mac"; "" for the whole record.
type Problem struct {
	Path string
	Text string
}

func (p Problem) Error() string {
	if p.Path == "" {
		return p.Text
	}
	return p.Path + ": " + p.Text
}

// checker collects the problems of one record.
type checker struct{ problems []Problem }

func (c *checker) bad(at, format string, a ...any) {
	c.problems = append(c.problems, Problem{at, fmt.Sprintf(format, a...)})
}

// Complete fills in the defaults and returns everything that is wrong with the
// record, nil if nothing is. It may be called again on a completed record.
func (in *Instance) Complete() []Problem {
	var c checker
	in.completeUserData(&c)
	for i := range in.Interfaces {
		in.completeInterface(&c, i)
	}
	in.completeCaller(&c)
	in.completeNames(&c)
	in.checkText(&c)
	c.oneOf("metadata-options.http-endpoint", &in.Metadata.Endpoint, "enabled", "disabled")
	c.oneOf("metadata-options.http-tokens", &in.Metadata.Tokens, "optional", "required")
	c.oneOf("metadata-options.http-protocol-ipv6", &in.Metadata.IPv6, "enabled", "disabled")
	c.oneOf("metadata-options.instance-metadata-tags", &in.Metadata.Tags, "disabled", "enabled")
	if in.Metadata.HopLimit == 0 {
		in.Metadata.HopLimit = 1
	}
	if in.Metadata.HopLimit < 1 || in.Metadata.HopLimit > 64 {
		c.bad("metadata-options.http-put-response-hop-limit", "%d is not 1 to 64", in.Metadata.HopLimit)
	}
	c.oneOf("instance-life-cycle", &in.LifeCycle, "on-demand", "spot", "scheduled", "capacity-block")
	c.oneOf("instance-action", &in.Action, "none", "bundle-pending")
	if in.AMILaunchIndex < 0 {
		c.bad("ami-launch-index", "%d is negative", in.AMILaunchIndex)
	}
	if p := in.Placement.PartitionNumber; p < 0 || p > 7 {
		c.bad("placement.partition-number", "%d is not 1 to 7", p)
	}
	in.checkTags(&c)
	in.checkKeys(&c)
	for _, p := range in.Events.Check() {
		c.bad("events."+p.Path, "%s", p.Text)
	}
	if in.Role != nil {
		if !validName(in.Role.Name) {
			c.bad("role.name", "%q is not a role's name (letters, digits and +=,.@_-)", in.Role.Name)
		}
		in.Role.Credentials.check(&c, "role", true)
	}
	if in.Identity != nil {
		in.Identity.check(&c, "identity-credentials", true)
	}
	if in.Launch != nil {
		in.Launch.check(&c)
	}
	return c.problems
}

// oneOf checks a choice; the first is the default.
func (c *checker) oneOf(path string, v *string, choices ...string) {
	if *v == "" {
		*v = choices[0]
	}
	if !slices.Contains(choices, *v) {
		c.bad(path, "%q is none of %s", *v, strings.Join(choices, ", "))
	}
}

func (in *Instance) completeUserData(c *checker) {
	if in.UserDataBase64 != "" {
		if in.UserData != nil {
			c.bad("user-data-base64", "given together with user-data: give one of them")
		}
		b, err := base64.StdEncoding.DecodeString(strings.Join(strings.Fields(in.UserDataBase64), ""))
		if err != nil {
			c.bad("user-data-base64", "not base64: %v", err)
		}
		in.UserData, in.UserDataBase64 = b, ""
	}
	if in.UserDataFile != "" {
		c.bad("user-data-file", "this source of records has no files: give user-data-base64")
	}
	if n := len(in.UserData); n > MaxUserData {
		c.bad("user-data", "%d bytes are more than the %d that user data may have", n, MaxUserData)
	}
}

func (in *Instance) completeInterface(c *checker, i int) {
	n := &in.Interfaces[i]
	path := fmt.Sprintf("interfaces[%d]", i)
	mac, err := net.ParseMAC(n.MAC)
	if err != nil || len(mac) != 6 {
		c.bad(path+".mac", "%q is not a MAC address like 02:00:00:00:00:01", n.MAC)
	} else {
		n.MAC = mac.String()
	}
	for j := range i {
		if in.Interfaces[j].MAC == n.MAC {
			c.bad(path+".mac", "%s is interface %d's too", n.MAC, j)
		}
	}
	if n.OwnerID == "" {
		n.OwnerID = in.AccountID
	}
	for j, a := range n.LocalIPv4s {
		c.family(fmt.Sprintf("%s.local-ipv4s[%d]", path, j), a, true)
	}
	for j, a := range n.PublicIPv4s {
		c.family(fmt.Sprintf("%s.public-ipv4s[%d]", path, j), a, true)
	}
	for j, a := range n.IPv6s {
		c.family(fmt.Sprintf("%s.ipv6s[%d]", path, j), a, false)
	}
	for a, private := range n.Associations {
		c.family(path+".ipv4-associations", a, true)
		if len(private) == 0 {
			c.bad(path+".ipv4-associations", "%s has no private address", a)
		}
	}
	if n.VPCIPv4CIDR.IsValid() && len(n.VPCIPv4CIDRs) == 0 {
		n.VPCIPv4CIDRs = []netip.Prefix{n.VPCIPv4CIDR}
	}
	if n.DeviceNumber < 0 || n.NetworkCard < 0 {
		c.bad(path, "device-number and network-card start at 0")
	}
}

func (c *checker) family(path string, a netip.Addr, v4 bool) {
	if a.IsValid() && a.Is4() == v4 && a.Zone() == "" {
		return
	}
	version := 6
	if v4 {
		version = 4
	}
	c.bad(path, "%q is not an IPv%d address", a, version)
}

func (in *Instance) completeCaller(c *checker) {
	cl := &in.Caller
	if len(cl.Addresses) == 0 && cl.Listener == "" {
		for _, n := range in.Interfaces {
			cl.Addresses = append(append(cl.Addresses, n.LocalIPv4s...), n.IPv6s...)
		}
		if len(cl.Addresses) == 0 {
			c.bad("caller", "nothing says which requests are this instance's: give caller.addresses, caller.listener or an interface with local-ipv4s")
		}
	}
	for i, a := range cl.Addresses {
		if !a.IsValid() || a.IsUnspecified() {
			c.bad(fmt.Sprintf("caller.addresses[%d]", i), "%q is not an address", a)
		}
		cl.Addresses[i] = a.Unmap()
	}
	if cl.MAC != "" {
		mac, err := net.ParseMAC(cl.MAC)
		if err != nil || len(mac) != 6 {
			c.bad("caller.mac", "%q is not a MAC address like 02:00:00:00:00:01", cl.MAC)
		} else {
			cl.MAC = mac.String()
		}
	}
}

func (in *Instance) completeNames(c *checker) {
	if !validID(in.ID) {
		c.bad("instance-id", "%q is not an instance id: letters, digits, '.', '_' and '-', 1 to 64 of them", in.ID)
	}
	setDefault(&in.Architecture, "x86_64")
	setDefault(&in.AMIManifest, "(unknown)")
	setDefault(&in.Profile, "default-hvm")
	setDefault(&in.Services.Domain, "amazonaws.com")
	setDefault(&in.Services.Partition, "aws")
	if z := in.Placement.Zone; z != "" {
		setDefault(&in.Placement.Region, strings.TrimRight(z, "abcdefghijklmnopqrstuvwxyz"))
		setDefault(&in.Placement.Region, z)
	}
	if in.Hostname == "" {
		if a := in.localIPv4(); a.IsValid() {
			in.Hostname = "ip-" + strings.ReplaceAll(a.String(), ".", "-")
		} else {
			in.Hostname = in.ID
		}
	}
	setDefault(&in.LocalHostname, in.Hostname)
	if len(in.Interfaces) > 0 {
		n := &in.Interfaces[0]
		setDefault(&n.LocalHostname, in.LocalHostname)
		setDefault(&in.PublicHostname, n.PublicHostname)
		setDefault(&n.PublicHostname, in.PublicHostname)
		if in.SecurityGroups == nil {
			in.SecurityGroups = n.SecurityGroups
		}
		if n.SecurityGroups == nil {
			n.SecurityGroups = in.SecurityGroups
		}
	}
}

func setDefault(v *string, d string) {
	if *v == "" {
		*v = d
	}
}

// localIPv4 is the instance's primary address, invalid if it has none.
func (in *Instance) localIPv4() netip.Addr {
	for _, n := range in.Interfaces {
		if len(n.LocalIPv4s) > 0 {
			return n.LocalIPv4s[0]
		}
	}
	for _, a := range in.Caller.Addresses {
		if a.Is4() {
			return a
		}
	}
	return netip.Addr{}
}

// checkText refuses values that could not be one line of a leaf.
func (in *Instance) checkText(c *checker) {
	line := func(path string, values ...string) {
		for _, v := range values {
			if strings.ContainsFunc(v, unicode.IsControl) || len(v) > 4096 {
				c.bad(path, "%.40q has control characters or is over 4096 bytes", v)
			}
		}
	}
	for _, f := range []struct {
		path   string
		values []string
	}{
		{"account-id", []string{in.AccountID}},
		{"architecture", []string{in.Architecture}},
		{"ami-id", []string{in.AMI}},
		{"ami-manifest-path", []string{in.AMIManifest}},
		{"ancestor-ami-ids", in.AncestorAMIs},
		{"kernel-id", []string{in.Kernel}},
		{"ramdisk-id", []string{in.Ramdisk}},
		{"product-codes", in.ProductCodes},
		{"hostname", []string{in.Hostname}},
		{"local-hostname", []string{in.LocalHostname}},
		{"public-hostname", []string{in.PublicHostname}},
		{"instance-type", []string{in.Type}},
		{"reservation-id", []string{in.Reservation}},
		{"security-groups", in.SecurityGroups},
		{"profile", []string{in.Profile}},
		{"system", []string{in.System}},
		{"placement", []string{in.Placement.Zone, in.Placement.ZoneID, in.Placement.Region, in.Placement.GroupName, in.Placement.HostID}},
		{"services", []string{in.Services.Domain, in.Services.Partition}},
	} {
		line(f.path, f.values...)
	}
	for i, n := range in.Interfaces {
		path := fmt.Sprintf("interfaces[%d]", i)
		line(path, n.ID, n.OwnerID, n.LocalHostname, n.PublicHostname, n.SubnetID, n.VPCID)
		line(path+".security-groups", n.SecurityGroups...)
		line(path+".security-group-ids", n.GroupIDs...)
		for _, p := range n.Associations {
			line(path+".ipv4-associations", p...)
		}
	}
	for name, dev := range in.BlockDevices {
		if !validName(name) || dev == "" {
			c.bad("block-device-mapping", "%q: %q is not a name and a device", name, dev)
		}
		line("block-device-mapping."+name, dev)
	}
}

func (in *Instance) checkTags(c *checker) {
	for k, v := range in.Tags {
		bad := k == "" || len(k) > 128 || strings.ContainsFunc(k, func(r rune) bool {
			return !unicode.IsLetter(r) && !unicode.IsDigit(r) && !strings.ContainsRune("+-=.,_:@", r)
		})
		if k == "." || k == ".." || bad && in.Metadata.Tags == "enabled" {
			c.bad("tags", "%q cannot be served as a path: letters, digits and +-=.,_:@ only, or set instance-metadata-tags: disabled", k)
		}
		if len(v) > 256 || strings.ContainsFunc(v, unicode.IsControl) {
			c.bad("tags."+k, "the value has control characters or is over 256 bytes")
		}
		// cloud-init takes N=name for a key pair's listing wherever it stands.
		if num, _, ok := strings.Cut(k, "="); ok && num != "" && strings.Trim(num, "0123456789") == "" && in.Metadata.Tags == "enabled" {
			c.bad("tags", "%q looks like a listed SSH key to cloud-init, which then fails to boot: rename it", k)
		}
	}
}

func (in *Instance) checkKeys(c *checker) {
	seen := make(map[string]bool, len(in.PublicKeys))
	for i := range in.PublicKeys {
		k := &in.PublicKeys[i]
		path := fmt.Sprintf("public-keys[%d]", i)
		if k.Name == "" || len(k.Name) > 255 || strings.ContainsFunc(k.Name, func(r rune) bool { return r == '=' || r == '/' || unicode.IsControl(r) }) {
			c.bad(path+".name", "%q is not a key pair's name: no '=', no '/', no control characters", k.Name)
		}
		if seen[k.Name] {
			c.bad(path+".name", "%q is given twice", k.Name)
		}
		seen[k.Name] = true
		k.Key = strings.TrimSpace(k.Key)
		if len(strings.Fields(k.Key)) < 2 || strings.ContainsFunc(k.Key, unicode.IsControl) {
			c.bad(path+".key", "not one line of an authorized_keys file")
		}
		if strings.Contains(k.Key, "PRIVATE KEY") {
			c.bad(path+".key", "this is a private key: give the .pub file's line")
		}
	}
}

// Check returns what is wrong with the events, with paths below them.
func (e *Events) Check() []Problem {
	var c checker
	if s := e.SpotAction; s != nil {
		if !slices.Contains([]string{"stop", "terminate", "hibernate"}, s.Action) {
			c.bad("spot.action", "%q is none of stop, terminate, hibernate", s.Action)
		}
		if s.Time.IsZero() {
			c.bad("spot.time", "missing: when the instance will be interrupted")
		}
	}
	states := []string{"", "Detached", "InService", "Standby", "Terminated", "Warmed:Hibernated", "Warmed:Running", "Warmed:Stopped", "Warmed:Terminated"}
	if !slices.Contains(states, e.Lifecycle) {
		c.bad("target-lifecycle-state", "%q is none of %s", e.Lifecycle, strings.Join(states[1:], ", "))
	}
	if m := e.Maintenance; m != nil {
		codes := []string{"instance-reboot", "system-reboot", "system-maintenance", "instance-retirement", "instance-stop"}
		for i, ev := range slices.Concat(m.Scheduled, m.History) {
			path := fmt.Sprintf("maintenance[%d]", i)
			if !slices.Contains(codes, ev.Code) {
				c.bad(path+".code", "%q is none of %s", ev.Code, strings.Join(codes, ", "))
			}
			if ev.NotBefore.IsZero() {
				c.bad(path+".not-before", "missing")
			}
		}
	}
	return c.problems
}

func (k *Credentials) check(c *checker, path string, required bool) {
	n := 0
	if s := k.Static; s != nil {
		n++
		if s.AccessKeyID == "" || s.SecretAccessKey == "" {
			c.bad(path+".static", "access-key-id and secret-access-key are required")
		}
	}
	if k.File != "" {
		n++
	}
	if s := k.STS; s != nil {
		n++
		u, err := url.Parse(s.Endpoint)
		if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
			c.bad(path+".sts.endpoint", "%q is not an http or https URL", s.Endpoint)
		}
		if s.AccessKeyID == "" || (s.SecretAccessKey == "") == (s.SecretFile == "") {
			c.bad(path+".sts", "access-key-id and one of secret-access-key and secret-access-key-file are required")
		}
		if s.Duration == 0 {
			s.Duration = Duration(time.Hour)
		}
		if d := time.Duration(s.Duration); d < 15*time.Minute || d > 12*time.Hour {
			c.bad(path+".sts.duration", "%s is not 15m to 12h", d)
		}
		setDefault(&s.Region, "us-east-1")
	}
	if n > 1 || n == 0 && required {
		c.bad(path, "give exactly one of static, file and sts")
	}
}

func (l *Launch) check(c *checker) {
	if l.Format != "ec2" && l.Format != "instar" {
		c.bad("launch.format", "%q is neither ec2 nor instar", l.Format)
	}
	if u, err := url.Parse(l.Store); err != nil || u.Scheme == "" {
		c.bad("launch.store", "%q is not a store's URL like s3://bucket/prefix", l.Store)
	}
	switch l.Mode {
	case "", "eager", "lazy", "lazy-or-eager":
	default:
		c.bad("launch.mode", "%q is none of eager, lazy, lazy-or-eager", l.Mode)
	}
	if l.Mode == "lazy" && l.Format == "ec2" {
		c.bad("launch.mode", "an EC2 bundle is one stream, of which no part can be read alone: eager or lazy-or-eager")
	}
	if l.Cache != "" && (!strings.HasPrefix(l.Cache, "http://") || cacheclient.CheckPlace(l.Cache) != nil) {
		c.bad("launch.cache", "%q is not http://HOST:PORT of a cache, as the instance reaches it", l.Cache)
	}
	if l.Cache != "" && l.Format == "ec2" {
		c.bad("launch.cache", "caches have pieces of Instar images; an EC2 bundle has none")
	}
	if l.Manifest == "" {
		c.bad("launch.manifest", "missing: the manifest's name below the store")
	}
	if s := l.ManifestSHA256; s != "" && (len(s) != 64 || strings.Trim(s, "0123456789abcdef") != "") {
		c.bad("launch.manifest-sha256", "not 64 lower-case hexadecimal digits")
	}
	switch l.Format {
	case "ec2":
		if l.Certificate == "" {
			c.bad("launch.certificate", "missing: the bundle's key is only unwrapped for a manifest that this certificate signed")
		}
	case "instar":
		if l.ManifestSHA256 == "" {
			c.bad("launch.manifest-sha256", "missing: a ticket pins the manifest")
		}
		if l.Signers == "" {
			c.bad("launch.signers", "missing: whom the instance may trust")
		}
	}
	if l.Reclaims == 0 {
		l.Reclaims = 16
	}
	if l.Reclaims < 0 {
		c.bad("launch.reclaims", "%d is negative", l.Reclaims)
	}
	l.Credentials.check(c, "launch.credentials", false)
	if s := l.Credentials.STS; s != nil && s.Policy == "" {
		s.Policy = l.policy()
	}
}

// policy allows reading the image's objects, which all stand beside its
// manifest, and nothing else.
func (l *Launch) policy() string {
	if l.Format == "instar" {
		return l.instarPolicy()
	}
	dir := strings.TrimPrefix(l.Store, "s3://")
	if d := path.Dir(l.Manifest); d != "." {
		dir = strings.TrimSuffix(dir, "/") + "/" + d
	}
	return `{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Action":["s3:GetObject"],"Resource":[` +
		quote("arn:aws:s3:::"+strings.TrimSuffix(dir, "/")+"/*") + `]}]}`
}

// instarPolicy gives what an Instar image is made of (bundle/chunked/SPEC.md
// §3): the image's own folder, and the packs and index objects of the store,
// which are too many to name and sealed.
func (l *Launch) instarPolicy() string {
	base := "arn:aws:s3:::" + strings.TrimSuffix(strings.TrimPrefix(l.Store, "s3://"), "/") + "/"
	var resources []string
	for _, folder := range []string{path.Dir(path.Dir(l.Manifest)), "packs", "index", "moved"} {
		resources = append(resources, quote(base+folder+"/*"))
	}
	return `{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Action":["s3:GetObject"],"Resource":[` + strings.Join(resources, ",") + `]}]}`
}

// validID reports whether an instance id is one path segment that no client
// could read as something else.
func validID(s string) bool {
	return s != "" && len(s) <= 64 && s != "." && s != ".." && !strings.ContainsFunc(s, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '-' && r != '.' && r != '_'
	})
}

func validName(s string) bool {
	return s != "" && len(s) <= 128 && s != "." && s != ".." && !strings.ContainsFunc(s, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && !strings.ContainsRune("+=,.@_-", r)
	})
}
