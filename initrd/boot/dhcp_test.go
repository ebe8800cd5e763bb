package boot_test

import (
	"encoding/binary"
	"fmt"
	"net"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"

	"github.com/instar-image/instar/test/freeport"
)

// dhcpNet is a wire (QEMU's dgram netdev: an Ethernet frame a datagram) with a
// DHCP server at its other end that answers as reply says; nil is silence.
func dhcpNet(t *testing.T, reply func(*dhcpv4.DHCPv4) (*dhcpv4.DHCPv4, error)) []string {
	t.Helper()
	host, err := net.ListenPacket("udp", "127.0.0.1:0")
	must(t, err)
	guest := &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: freeport.Port(t)} // QEMU's end
	done := make(chan struct{})
	t.Cleanup(func() { host.Close(); <-done })
	go func() {
		defer close(done)
		buf := make([]byte, 2048)
		for {
			n, _, err := host.ReadFrom(buf)
			if err != nil {
				return
			}
			request := dhcpOf(buf[:n])
			if request == nil {
				continue
			}
			answer, err := reply(request)
			if err != nil || answer == nil {
				continue
			}
			host.WriteTo(frame(answer, request.ClientHWAddr), guest)
		}
	}()
	return []string{
		"-netdev", fmt.Sprintf("dgram,id=n0,local.type=inet,local.host=127.0.0.1,local.port=%d,remote.type=inet,remote.host=127.0.0.1,remote.port=%d",
			guest.Port, host.LocalAddr().(*net.UDPAddr).Port),
		"-device", "virtio-net-pci,netdev=n0,romfile=",
	}
}

// dhcpOf is the DHCP message in an Ethernet frame, if there is one.
func dhcpOf(b []byte) *dhcpv4.DHCPv4 {
	if len(b) < 14+20+8 || binary.BigEndian.Uint16(b[12:]) != 0x0800 || b[23] != 17 {
		return nil
	}
	ihl := int(b[14]&15) * 4
	if len(b) < 14+ihl+8 || binary.BigEndian.Uint16(b[14+ihl+2:]) != 67 {
		return nil
	}
	m, err := dhcpv4.FromBytes(b[14+ihl+8:])
	if err != nil {
		return nil
	}
	return m
}

// frame puts a DHCP message into UDP, IPv4 and Ethernet.
func frame(m *dhcpv4.DHCPv4, to net.HardwareAddr) []byte {
	body := m.ToBytes()
	b := make([]byte, 14+20+8, 14+20+8+len(body))
	copy(b, to)
	copy(b[6:], []byte{2, 0, 0, 0, 0, 1})
	binary.BigEndian.PutUint16(b[12:], 0x0800)
	ip := b[14:34]
	ip[0], ip[8], ip[9] = 0x45, 64, 17
	binary.BigEndian.PutUint16(ip[2:], uint16(20+8+len(body)))
	copy(ip[12:], serverIP.To4())
	copy(ip[16:], net.IPv4bcast.To4())
	sum := uint32(0)
	for i := 0; i < 20; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(ip[i:]))
	}
	binary.BigEndian.PutUint16(ip[10:], ^uint16(sum+sum>>16))
	udp := b[34:42]
	binary.BigEndian.PutUint16(udp, 67)
	binary.BigEndian.PutUint16(udp[2:], 68)
	binary.BigEndian.PutUint16(udp[4:], uint16(8+len(body)))
	return append(b, body...)
}

var serverIP = net.IPv4(192, 0, 2, 1)

func offer(m *dhcpv4.DHCPv4, kind dhcpv4.MessageType, more ...dhcpv4.Modifier) (*dhcpv4.DHCPv4, error) {
	return dhcpv4.NewReplyFromRequest(m, append([]dhcpv4.Modifier{
		dhcpv4.WithMessageType(kind), dhcpv4.WithServerIP(serverIP), dhcpv4.WithOption(dhcpv4.OptServerIdentifier(serverIP)),
		dhcpv4.WithYourIP(net.IPv4(192, 0, 2, 9)), dhcpv4.WithNetmask(net.CIDRMask(24, 32)), dhcpv4.WithLeaseTime(uint32(time.Hour.Seconds())),
	}, more...)...)
}

// refuse offers, and then says no.
func refuse(m *dhcpv4.DHCPv4) (*dhcpv4.DHCPv4, error) {
	if m.MessageType() == dhcpv4.MessageTypeDiscover {
		return offer(m, dhcpv4.MessageTypeOffer)
	}
	return dhcpv4.NewReplyFromRequest(m, dhcpv4.WithMessageType(dhcpv4.MessageTypeNak),
		dhcpv4.WithOption(dhcpv4.OptServerIdentifier(serverIP)), dhcpv4.WithOption(dhcpv4.OptMessage("go away")))
}

// everything gives an address with router, servers, an MTU that is wrong and
// classless routes.
func everything(m *dhcpv4.DHCPv4) (*dhcpv4.DHCPv4, error) {
	kind := dhcpv4.MessageTypeOffer
	if m.MessageType() == dhcpv4.MessageTypeRequest {
		kind = dhcpv4.MessageTypeAck
	}
	_, all, err := net.ParseCIDR("0.0.0.0/0")
	if err != nil {
		return nil, err
	}
	return offer(m, kind, dhcpv4.WithRouter(serverIP), dhcpv4.WithDNS(serverIP),
		dhcpv4.WithOption(dhcpv4.Option{Code: dhcpv4.OptionInterfaceMTU, Value: dhcpv4.Uint16(100)}),
		dhcpv4.WithOption(dhcpv4.OptClasslessStaticRoute(&dhcpv4.Route{Dest: all, Router: serverIP})))
}
