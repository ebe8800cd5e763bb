package metadata

import (
	"context"
	"encoding/json"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
)

// newTree makes the tree below a version: every category of EC2's with the
// version it came in, those of Elastic Inference, vhostmd and EC2 Instance
// Connect excepted, whose services exist nowhere else.
func newTree() *node {
	root := dir("", "",
		metaData(),
		dynamic(),
		node{name: "user-data", since: "1.0", raw: func(v *view) []byte { return v.in.UserData }},
	)
	return &root
}

func metaData() node {
	in := func(name, since string, f func(*Instance) string) node {
		return text(name, since, func(v *view) string { return f(v.in) })
	}
	inLines := func(name, since string, f func(*Instance) []string) node {
		return lines(name, since, func(v *view) []string { return f(v.in) }, same)
	}
	return dir("meta-data", "1.0",
		in("ami-id", "1.0", func(i *Instance) string { return i.AMI }),
		in("ami-launch-index", "1.0", func(i *Instance) string { return strconv.Itoa(i.AMILaunchIndex) }),
		in("ami-manifest-path", "1.0", func(i *Instance) string { return i.AMIManifest }),
		inLines("ancestor-ami-ids", "2007-10-10", func(i *Instance) []string { return i.AncestorAMIs }),
		dir("autoscaling", "2021-07-15", text("target-lifecycle-state", "2021-07-15", func(v *view) string { return v.events().Lifecycle })),
		blockDevices(),
		events(),
		in("hostname", "1.0", func(i *Instance) string { return i.Hostname }),
		iam(),
		identityCredentials(),
		in("instance-action", "2008-09-01", func(i *Instance) string { return i.Action }),
		in("instance-id", "1.0", func(i *Instance) string { return i.ID }),
		in("instance-life-cycle", "2019-10-01", func(i *Instance) string { return i.LifeCycle }),
		in("instance-type", "2007-08-29", func(i *Instance) string { return i.Type }),
		in("ipv6", "2021-01-03", func(i *Instance) string { return first(i, func(n *Interface) []netip.Addr { return n.IPv6s }) }),
		in("kernel-id", "2008-02-01", func(i *Instance) string { return i.Kernel }),
		in("local-hostname", "2007-01-19", func(i *Instance) string { return i.LocalHostname }),
		in("local-ipv4", "1.0", func(i *Instance) string { return addr(i.localIPv4()) }),
		in("mac", "2011-01-01", func(i *Instance) string {
			if len(i.Interfaces) == 0 {
				return ""
			}
			return i.Interfaces[0].MAC
		}),
		network(),
		placement(),
		inLines("product-codes", "2007-03-01", func(i *Instance) []string { return i.ProductCodes }),
		in("profile", "1.0", func(i *Instance) string { return i.Profile }),
		in("public-hostname", "2007-01-19", func(i *Instance) string { return i.PublicHostname }),
		in("public-ipv4", "2007-01-19", func(i *Instance) string {
			return first(i, func(n *Interface) []netip.Addr { return n.PublicIPv4s })
		}),
		publicKeys(),
		in("ramdisk-id", "2007-10-10", func(i *Instance) string { return i.Ramdisk }),
		in("reservation-id", "1.0", func(i *Instance) string { return i.Reservation }),
		inLines("security-groups", "1.0", func(i *Instance) []string { return i.SecurityGroups }),
		dir("services", "2014-02-25",
			in("domain", "2014-02-25", func(i *Instance) string { return i.Services.Domain }),
			in("partition", "2015-10-20", func(i *Instance) string { return i.Services.Partition }),
		),
		spot(),
		in("system", "2018-09-24", func(i *Instance) string { return i.System }),
		tags(),
	)
}

// addr formats an address, an invalid one as "".
func addr(a netip.Addr) string {
	if !a.IsValid() {
		return ""
	}
	return a.String()
}

// first is the first address of the first interface that has one.
func first(in *Instance, of func(*Interface) []netip.Addr) string {
	for i := range in.Interfaces {
		if a := of(&in.Interfaces[i]); len(a) > 0 {
			return a[0].String()
		}
	}
	return ""
}

func blockDevices() node {
	return node{
		name: "block-device-mapping", since: "2007-12-15",
		names: func(v *view) []string { return slices.Sorted(maps.Keys(v.in.BlockDevices)) },
		enter: func(v *view, name string) bool { v.name = name; _, ok := v.in.BlockDevices[name]; return ok },
		each:  &node{leaf: func(v *view) (string, bool) { d, ok := v.in.BlockDevices[v.name]; return d, ok }},
	}
}

func tags() node {
	on := func(v *view) bool { return v.in.Metadata.Tags == "enabled" }
	instance := node{
		name: "instance", since: "2021-03-23",
		names: func(v *view) []string {
			if !on(v) {
				return nil
			}
			return slices.Sorted(maps.Keys(v.in.Tags))
		},
		enter: func(v *view, name string) bool { v.name = name; _, ok := v.in.Tags[name]; return ok && on(v) },
		each:  &node{leaf: func(v *view) (string, bool) { t, ok := v.in.Tags[v.name]; return t, ok }},
	}
	return dir("tags", "2021-03-23", instance)
}

// publicKeys lists "0=name", and serves that as 0/openssh-key.
func publicKeys() node {
	entry := dir("", "1.0", text("openssh-key", "1.0", func(v *view) string { return v.key.Key }))
	return node{
		name: "public-keys", since: "1.0",
		names: func(v *view) []string {
			out := make([]string, len(v.in.PublicKeys))
			for i, k := range v.in.PublicKeys {
				out[i] = strconv.Itoa(i) + "=" + k.Name
			}
			return out
		},
		enter: func(v *view, name string) bool {
			i, err := strconv.Atoi(name)
			if err != nil || i < 0 || i >= len(v.in.PublicKeys) || strconv.Itoa(i) != name {
				return false
			}
			v.key = &v.in.PublicKeys[i]
			return true
		},
		each: &entry,
	}
}

func placement() node {
	p := func(name, since string, f func(*Placement) string) node {
		return text(name, since, func(v *view) string { return f(&v.in.Placement) })
	}
	return dir("placement", "2008-02-01",
		p("availability-zone", "2008-02-01", func(p *Placement) string { return p.Zone }),
		p("availability-zone-id", "2019-10-01", func(p *Placement) string { return p.ZoneID }),
		p("group-name", "2020-08-24", func(p *Placement) string { return p.GroupName }),
		p("host-id", "2020-08-24", func(p *Placement) string { return p.HostID }),
		p("partition-number", "2020-08-24", func(p *Placement) string {
			if p.PartitionNumber == 0 {
				return ""
			}
			return strconv.Itoa(p.PartitionNumber)
		}),
		p("region", "2020-08-24", func(p *Placement) string { return p.Region }),
	)
}

func network() node {
	n := func(name, since string, f func(*Interface) string) node {
		return text(name, since, func(v *view) string { return f(v.nic) })
	}
	addrs := func(name, since string, f func(*Interface) []netip.Addr) node {
		return lines(name, since, func(v *view) []netip.Addr { return f(v.nic) }, netip.Addr.String)
	}
	nets := func(name, since string, f func(*Interface) []netip.Prefix) node {
		return lines(name, since, func(v *view) []netip.Prefix { return f(v.nic) }, netip.Prefix.String)
	}
	strs := func(name, since string, f func(*Interface) []string) node {
		return lines(name, since, func(v *view) []string { return f(v.nic) }, same)
	}
	prefix := func(p netip.Prefix) string {
		if !p.IsValid() {
			return ""
		}
		return p.String()
	}
	const vpc, ipv6 = "2011-01-01", "2016-06-30"
	entry := dir("", vpc,
		n("device-number", vpc, func(n *Interface) string { return strconv.Itoa(n.DeviceNumber) }),
		n("interface-id", vpc, func(n *Interface) string { return n.ID }),
		associations(),
		nets("ipv4-prefix", "2021-01-03", func(n *Interface) []netip.Prefix { return n.IPv4Prefixes }),
		nets("ipv6-prefix", "2021-01-03", func(n *Interface) []netip.Prefix { return n.IPv6Prefixes }),
		addrs("ipv6s", ipv6, func(n *Interface) []netip.Addr { return n.IPv6s }),
		n("local-hostname", vpc, func(n *Interface) string { return n.LocalHostname }),
		addrs("local-ipv4s", vpc, func(n *Interface) []netip.Addr { return n.LocalIPv4s }),
		n("mac", vpc, func(n *Interface) string { return n.MAC }),
		n("network-card", "2020-11-01", func(n *Interface) string { return strconv.Itoa(n.NetworkCard) }),
		n("owner-id", vpc, func(n *Interface) string { return n.OwnerID }),
		n("public-hostname", vpc, func(n *Interface) string { return n.PublicHostname }),
		addrs("public-ipv4s", vpc, func(n *Interface) []netip.Addr { return n.PublicIPv4s }),
		strs("security-group-ids", vpc, func(n *Interface) []string { return n.GroupIDs }),
		strs("security-groups", vpc, func(n *Interface) []string { return n.SecurityGroups }),
		n("subnet-id", vpc, func(n *Interface) string { return n.SubnetID }),
		n("subnet-ipv4-cidr-block", vpc, func(n *Interface) string { return prefix(n.SubnetIPv4CIDR) }),
		nets("subnet-ipv6-cidr-blocks", ipv6, func(n *Interface) []netip.Prefix { return n.SubnetIPv6CIDRs }),
		n("vpc-id", vpc, func(n *Interface) string { return n.VPCID }),
		n("vpc-ipv4-cidr-block", vpc, func(n *Interface) string { return prefix(n.VPCIPv4CIDR) }),
		nets("vpc-ipv4-cidr-blocks", ipv6, func(n *Interface) []netip.Prefix { return n.VPCIPv4CIDRs }),
		nets("vpc-ipv6-cidr-blocks", ipv6, func(n *Interface) []netip.Prefix { return n.VPCIPv6CIDRs }),
	)
	macs := node{
		name: "macs", since: vpc,
		names: func(v *view) []string {
			out := make([]string, len(v.in.Interfaces))
			for i := range v.in.Interfaces {
				out[i] = v.in.Interfaces[i].MAC
			}
			slices.Sort(out)
			return out
		},
		enter: func(v *view, name string) bool {
			for i := range v.in.Interfaces {
				if v.in.Interfaces[i].MAC == name {
					v.nic = &v.in.Interfaces[i]
					return true
				}
			}
			return false
		},
		each: &entry,
	}
	return dir("network", vpc, dir("interfaces", vpc, macs))
}

func associations() node {
	return node{
		name: "ipv4-associations", since: "2011-01-01",
		names: func(v *view) []string {
			public := slices.SortedFunc(maps.Keys(v.nic.Associations), netip.Addr.Compare)
			out := make([]string, len(public))
			for i, a := range public {
				out[i] = a.String()
			}
			return out
		},
		enter: func(v *view, name string) bool {
			v.name = name
			a, err := netip.ParseAddr(name)
			_, ok := v.nic.Associations[a]
			return err == nil && ok && a.String() == name
		},
		each: &node{leaf: func(v *view) (string, bool) {
			a, err := netip.ParseAddr(v.name)
			private, ok := v.nic.Associations[a]
			return strings.Join(private, "\n"), err == nil && ok
		}},
	}
}

func spot() node {
	action := func(v *view) *SpotAction { return v.events().SpotAction }
	return dir("spot", "2014-11-05",
		text("instance-action", "2016-11-15", func(v *view) string {
			a := action(v)
			if a == nil {
				return ""
			}
			return `{"action":"` + a.Action + `","time":"` + stamp(a.Time) + `"}`
		}),
		text("termination-time", "2014-11-05", func(v *view) string {
			if a := action(v); a != nil && a.Action != "hibernate" {
				return stamp(a.Time)
			}
			return ""
		}),
	)
}

func events() node {
	maintenance := func(name string, of func(*Maintenance) []MaintenanceEvent) node {
		return text(name, "2018-08-17", func(v *view) string {
			m := v.events().Maintenance
			if m == nil {
				return "[]"
			}
			return maintenanceJSON(of(m))
		})
	}
	return dir("events", "2018-08-17",
		dir("maintenance", "2018-08-17",
			maintenance("history", func(m *Maintenance) []MaintenanceEvent { return m.History }),
			maintenance("scheduled", func(m *Maintenance) []MaintenanceEvent { return m.Scheduled }),
		),
		dir("recommendations", "2020-10-27", text("rebalance", "2020-10-27", func(v *view) string {
			t := v.events().Rebalance
			if t == nil {
				return ""
			}
			return `{"noticeTime":"` + stamp(*t) + `"}`
		})),
	)
}

func maintenanceJSON(events []MaintenanceEvent) string {
	type entry struct {
		NotBefore, Code, Description, EventId string
		NotAfter                              string `json:",omitempty"`
		State                                 string
	}
	const form = "2 Jan 2006 15:04:05 GMT"
	out := make([]entry, len(events))
	for i, e := range events {
		out[i] = entry{NotBefore: e.NotBefore.UTC().Format(form), Code: e.Code, Description: e.Description, EventId: e.ID, State: e.State}
		if !e.NotAfter.IsZero() {
			out[i].NotAfter = e.NotAfter.UTC().Format(form)
		}
	}
	b, err := json.MarshalIndent(out, "", "  ")
	if err != nil { // strings cannot fail to marshal
		return "[]"
	}
	return string(b)
}

// stamp formats a time as EC2 does, in UTC, to the second.
func stamp(t time.Time) string { return t.UTC().Format("2006-01-02T15:04:05Z") }

func iam() node {
	hasRole := func(v *view) bool { return v.in.Role != nil }
	keys := node{
		name: "security-credentials", since: "2012-01-12",
		names: func(v *view) []string {
			if !hasRole(v) {
				return nil
			}
			return []string{v.in.Role.Name}
		},
		enter: func(v *view, name string) bool { return hasRole(v) && v.in.Role.Name == name },
		each: &node{fetch: func(ctx context.Context, v *view) (string, error) {
			return v.h.keys.JSON(ctx, v.in.ID, &v.in.Role.Credentials, v.now)
		}},
	}
	return dir("iam", "2012-01-12", keys, text("info", "2012-01-12", func(v *view) string {
		if !hasRole(v) {
			return ""
		}
		r := v.in.Role
		arn := r.ProfileARN
		if arn == "" {
			arn = "arn:" + v.in.Services.Partition + ":iam::" + v.in.AccountID + ":instance-profile/" + r.Name
		}
		return object("Code", "Success", "LastUpdated", stamp(v.now), "InstanceProfileArn", arn, "InstanceProfileId", r.ProfileID)
	}))
}

func identityCredentials() node {
	const since = "2018-05-23"
	has := func(v *view) bool { return v.in.Identity != nil }
	return dir("identity-credentials", since, dir("ec2", since,
		text("info", since, func(v *view) string {
			if !has(v) {
				return ""
			}
			return object("Code", "Success", "LastUpdated", stamp(v.now), "AccountId", v.in.AccountID)
		}),
		dir("security-credentials", since, node{
			name: "ec2-instance", since: since, when: has,
			fetch: func(ctx context.Context, v *view) (string, error) {
				if !has(v) {
					return "", errAbsent
				}
				return v.h.keys.JSON(ctx, v.in.ID, v.in.Identity, v.now)
			},
		}),
	))
}

// object formats a flat JSON object of strings the way EC2 lays it out.
func object(pairs ...string) string {
	members := make([]string, 0, len(pairs)/2)
	for i := 0; i+1 < len(pairs); i += 2 {
		members = append(members, "  "+quote(pairs[i])+" : "+quote(pairs[i+1]))
	}
	return "{\n" + strings.Join(members, ",\n") + "\n}"
}

func quote(s string) string {
	b, err := json.Marshal(s)
	if err != nil { // strings cannot fail to marshal
		return `""`
	}
	return string(b)
}

func dynamic() node {
	const since = "2009-04-04"
	return dir("dynamic", since,
		dir("fws", since, text("instance-monitoring", since, func(v *view) string {
			if v.in.Monitoring {
				return "enabled"
			}
			return "disabled"
		})),
		dir("instance-identity", since,
			text("document", since, func(v *view) string { return v.in.document() }),
			signed("pkcs7", func(s *Signatures) string { return s.PKCS7 }),
			signed("rsa2048", func(s *Signatures) string { return s.RSA2048 }),
			signed("signature", func(s *Signatures) string { return s.Signature }),
		),
	)
}

func signed(name string, of func(*Signatures) string) node {
	return node{
		name: name, since: "2009-04-04",
		when: func(v *view) bool { return v.h.signer != nil },
		fetch: func(_ context.Context, v *view) (string, error) {
			if v.h.signer == nil {
				return "", errAbsent
			}
			s, err := v.h.signer.sign(v.in)
			if err != nil {
				return "", err
			}
			return of(s), nil
		},
	}
}
