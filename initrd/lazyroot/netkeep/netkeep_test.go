package netkeep

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// apart is in a network namespace of its own, with an interface that has an
// address and routes.
func apart(t testing.TB) (netlink.Link, State) {
	t.Helper()
	runtime.LockOSThread() // the thread ends with the test
	must(t, unix.Unshare(unix.CLONE_NEWNET))
	must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0", MTU: 1400}, PeerName: "other"}))
	link, err := netlink.LinkByName("eth0")
	must(t, err)
	must(t, netlink.LinkSetUp(link))
	other, err := netlink.LinkByName("other")
	must(t, err)
	must(t, netlink.LinkSetUp(other))
	for _, a := range []string{"192.0.2.9/24", "2001:db8::9/64"} {
		addr, err := netlink.ParseAddr(a)
		must(t, err)
		addr.Flags = unix.IFA_F_NODAD
		must(t, netlink.AddrReplace(link, addr))
	}
	for _, gw := range []string{"192.0.2.1", "2001:db8::1"} {
		must(t, netlink.RouteReplace(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: net.ParseIP(gw), Flags: int(netlink.FLAG_ONLINK)}))
	}
	_, dst, err := net.ParseCIDR("198.51.100.0/24")
	must(t, err)
	must(t, netlink.RouteReplace(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: dst, Gw: net.ParseIP("192.0.2.2")}))
	s, err := Take(link)
	must(t, err)
	return link, s
}

func same(t testing.TB, link netlink.Link, want State) error {
	t.Helper()
	got, err := Take(link)
	must(t, err)
	sortRoutes(got.Routes)
	sortRoutes(want.Routes)
	a, _ := json.Marshal(got)
	b, _ := json.Marshal(want)
	if string(a) != string(b) {
		return fmt.Errorf("%s, want %s", a, b)
	}
	return nil
}

func sortRoutes(list []Route) {
	slices.SortFunc(list, func(a, b Route) int { return strings.Compare(a.String(), b.String()) })
}

// TestRestore takes an interface's state away in several ways.
func TestRestore(t *testing.T) {
	link, s := apart(t)
	if len(s.Addrs) != 2 || len(s.Routes) != 3 || s.MTU != 1400 {
		t.Fatalf("%+v", s)
	}
	if done, err := s.Restore(); err != nil || len(done) > 0 {
		t.Errorf("nothing is missing: %q, %v", done, err)
	}
	removeAll := func() {
		addrs, err := netlink.AddrList(link, netlink.FAMILY_ALL)
		must(t, err)
		for _, a := range addrs {
			must(t, netlink.AddrDel(link, &a))
		}
	}
	for _, c := range []struct {
		name string
		take func()
	}{
		{"addresses", removeAll},
		{"down", func() { must(t, netlink.LinkSetDown(link)) }},
		{"another name", func() {
			must(t, netlink.LinkSetDown(link))
			must(t, netlink.LinkSetName(link, "ens3"))
		}},
		{"all", func() { removeAll(); must(t, netlink.LinkSetDown(link)) }},
	} {
		c.take()
		if err := same(t, link, s); err == nil {
			t.Errorf("%s: it was not taken", c.name)
		}
		done, err := s.Restore()
		if err != nil || len(done) == 0 {
			t.Errorf("%s: %q, %v", c.name, done, err)
		}
		if err := same(t, link, s); err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
	}

	// Another default route serves as well.
	routes, err := netlink.RouteList(link, netlink.FAMILY_V4)
	must(t, err)
	for _, r := range routes {
		if r.Dst == nil || isDefault(r.Dst) {
			must(t, netlink.RouteDel(&r))
		}
	}
	must(t, netlink.RouteReplace(&netlink.Route{LinkIndex: s.Index, Gw: net.ParseIP("192.0.2.254"), Priority: 1024}))
	if done, err := s.Restore(); err != nil || len(done) > 0 {
		t.Errorf("with another default route: %q, %v", done, err)
	}
	must(t, netlink.LinkDel(link))
	if _, err := s.Restore(); err == nil {
		t.Error("without the interface")
	}
}

// TestKeep has what was removed put back by itself.
func TestKeep(t *testing.T) {
	link, s := apart(t)
	// As it comes out of the initrd.
	text, err := json.Marshal(s)
	must(t, err)
	var kept State
	must(t, json.Unmarshal(text, &kept))
	ctx, cancel := context.WithCancel(t.Context())
	var mu sync.Mutex
	var said []string
	ended := make(chan error)
	ns, err := unix.Open(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()), unix.O_RDONLY, 0)
	must(t, err)
	defer unix.Close(ns)
	go func() {
		runtime.LockOSThread()
		if err := unix.Setns(ns, unix.CLONE_NEWNET); err != nil {
			ended <- err
			return
		}
		ended <- kept.Keep(ctx, func(format string, args ...any) {
			mu.Lock()
			defer mu.Unlock()
			said = append(said, fmt.Sprintf(format, args...))
		})
	}()
	for range 3 {
		addrs, err := netlink.AddrList(link, netlink.FAMILY_V4)
		must(t, err)
		for _, a := range addrs {
			must(t, netlink.AddrDel(link, &a))
		}
		must(t, netlink.LinkSetDown(link))
		must(t, netlink.LinkSetName(link, "lan"))
		for same(t, link, s) != nil {
			time.Sleep(10 * time.Millisecond)
		}
	}
	cancel()
	if err := <-ended; err != context.Canceled {
		t.Errorf("it ended with %v", err)
	}
	mu.Lock()
	defer mu.Unlock()
	if all := strings.Join(said, "\n"); !strings.Contains(all, "the root needs lan: put back address 192.0.2.9/24") {
		t.Errorf("it said %s", all)
	}
}
