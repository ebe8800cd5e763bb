package metadata

import (
	"net/netip"
	"time"
)

// Instance is the record of one instance: who it is, how its requests are
// recognised and what it is told. The YAML names are the schema of an instance
// file; names that EC2 has are EC2's. Fields left out are absent from the tree
// unless a default is given. A record must not be changed once it is in a [Set].
type Instance struct {
	// ID is the instance id, "i-0123456789abcdef0" on EC2; here letters,
	// digits, '.', '_' and '-', at most 64 of them. Required.
	ID string `yaml:"instance-id"`

	Caller   Caller          `yaml:"caller"`
	Metadata MetadataOptions `yaml:"metadata-options"`

	LaunchTime   time.Time `yaml:"launch-time"` // pendingTime of the identity document, RFC 3339
	AccountID    string    `yaml:"account-id"`
	Architecture string    `yaml:"architecture"` // default x86_64

	AMI            string   `yaml:"ami-id"`
	AMILaunchIndex int      `yaml:"ami-launch-index"`
	AMIManifest    string   `yaml:"ami-manifest-path"` // default "(unknown)"
	AncestorAMIs   []string `yaml:"ancestor-ami-ids"`
	Kernel         string   `yaml:"kernel-id"`
	Ramdisk        string   `yaml:"ramdisk-id"`
	ProductCodes   []string `yaml:"product-codes"`

	Hostname       string   `yaml:"hostname"`        // default ip-A-B-C-D of the first address
	LocalHostname  string   `yaml:"local-hostname"`  // default: hostname
	PublicHostname string   `yaml:"public-hostname"` // default: the first interface's
	Type           string   `yaml:"instance-type"`
	LifeCycle      string   `yaml:"instance-life-cycle"` // on-demand (default), spot, scheduled, capacity-block
	Action         string   `yaml:"instance-action"`     // none (default), bundle-pending
	Reservation    string   `yaml:"reservation-id"`
	SecurityGroups []string `yaml:"security-groups"` // default: the first interface's
	Profile        string   `yaml:"profile"`         // default default-hvm
	System         string   `yaml:"system"`
	Monitoring     bool     `yaml:"monitoring"`

	PublicKeys   []PublicKey       `yaml:"public-keys"`
	Interfaces   []Interface       `yaml:"interfaces"`
	Placement    Placement         `yaml:"placement"`
	Services     Services          `yaml:"services"`
	BlockDevices map[string]string `yaml:"block-device-mapping"` // ami, root, swap, ebsN, ephemeralN: device
	Tags         map[string]string `yaml:"tags"`
	Role         *Role             `yaml:"role"`
	Identity     *Credentials      `yaml:"identity-credentials"`
	Events       Events            `yaml:"events"` // until an operator sets others
	Launch       *Launch           `yaml:"launch"`

	// UserData is given to the instance byte for byte; at most 16,384 bytes.
	// Exactly one of the three keys may be given. UserDataFile is read by the
	// source, which leaves the content in UserData; nil means none, so that
	// an empty file is empty user data.
	UserData       Blob   `yaml:"user-data"`
	UserDataBase64 string `yaml:"user-data-base64"`
	UserDataFile   string `yaml:"user-data-file"`
}

// Blob is bytes that YAML carries as text.
type Blob []byte

// UnmarshalText takes the text as it is.
func (b *Blob) UnmarshalText(text []byte) error {
	*b = append(make(Blob, 0, len(text)), text...)
	return nil
}

// Caller says which requests are this instance's. At least one of Addresses
// and Listener must be given, or an interface with a local address.
type Caller struct {
	// Addresses are source addresses, IPv4, IPv6, or link-local IPv6 with its
	// zone ("fe80::1%tap0"). Default, without Listener: every local-ipv4s and
	// ipv6s of the interfaces.
	Addresses []netip.Addr `yaml:"addresses"`
	// Listener names a listener or the interface it is bound to. With it and
	// no address, whatever comes in there is this instance; with addresses,
	// both must fit. A listener that any record names serves only records
	// that name it: a forged source address on it finds nobody.
	Listener string `yaml:"listener"`
	// MAC, if given, must be the caller's in the kernel's neighbour table.
	MAC string `yaml:"mac"`
}

// MetadataOptions are EC2's metadata options of an instance.
type MetadataOptions struct {
	Endpoint string `yaml:"http-endpoint"`               // enabled (default), disabled: every answer is 403
	Tokens   string `yaml:"http-tokens"`                 // optional (default), required
	HopLimit int    `yaml:"http-put-response-hop-limit"` // IP TTL of the answers to token requests, 1 (default) - 64
	IPv6     string `yaml:"http-protocol-ipv6"`          // enabled (default), disabled
	Tags     string `yaml:"instance-metadata-tags"`      // enabled, disabled (default)
}

// PublicKey is an SSH key for the instance's login user.
type PublicKey struct {
	Name string `yaml:"name"` // the key pair's name; no '=' in it
	Key  string `yaml:"key"`  // an authorized_keys line
}

// Interface is one network interface.
type Interface struct {
	MAC             string                  `yaml:"mac"` // required
	DeviceNumber    int                     `yaml:"device-number"`
	NetworkCard     int                     `yaml:"network-card"`
	ID              string                  `yaml:"interface-id"`
	OwnerID         string                  `yaml:"owner-id"`       // default: account-id
	LocalHostname   string                  `yaml:"local-hostname"` // default: the instance's, for the first interface
	LocalIPv4s      []netip.Addr            `yaml:"local-ipv4s"`
	PublicHostname  string                  `yaml:"public-hostname"`
	PublicIPv4s     []netip.Addr            `yaml:"public-ipv4s"`
	Associations    map[netip.Addr][]string `yaml:"ipv4-associations"` // public address: private ones
	IPv6s           []netip.Addr            `yaml:"ipv6s"`
	IPv4Prefixes    []netip.Prefix          `yaml:"ipv4-prefix"`
	IPv6Prefixes    []netip.Prefix          `yaml:"ipv6-prefix"`
	SecurityGroups  []string                `yaml:"security-groups"`
	GroupIDs        []string                `yaml:"security-group-ids"`
	SubnetID        string                  `yaml:"subnet-id"`
	SubnetIPv4CIDR  netip.Prefix            `yaml:"subnet-ipv4-cidr-block"`
	SubnetIPv6CIDRs []netip.Prefix          `yaml:"subnet-ipv6-cidr-blocks"`
	VPCID           string                  `yaml:"vpc-id"`
	VPCIPv4CIDR     netip.Prefix            `yaml:"vpc-ipv4-cidr-block"`
	VPCIPv4CIDRs    []netip.Prefix          `yaml:"vpc-ipv4-cidr-blocks"`
	VPCIPv6CIDRs    []netip.Prefix          `yaml:"vpc-ipv6-cidr-blocks"`
}

// Placement is where the instance runs.
type Placement struct {
	Zone            string `yaml:"availability-zone"`
	ZoneID          string `yaml:"availability-zone-id"`
	Region          string `yaml:"region"` // default: the zone without its last letter
	GroupName       string `yaml:"group-name"`
	HostID          string `yaml:"host-id"`
	PartitionNumber int    `yaml:"partition-number"` // 1-7; 0: none
}

// Services names the cloud; the defaults are EC2's.
type Services struct {
	Domain    string `yaml:"domain"`    // default amazonaws.com
	Partition string `yaml:"partition"` // default aws
}

// Role is the IAM role whose credentials the instance may use.
type Role struct {
	Name        string      `yaml:"name"`
	ProfileARN  string      `yaml:"instance-profile-arn"`
	ProfileID   string      `yaml:"instance-profile-id"`
	Credentials Credentials `yaml:",inline"`
}

// Credentials says where access keys come from: exactly one is given.
type Credentials struct {
	Static *StaticKeys `yaml:"static"`
	File   string      `yaml:"file"` // JSON as the metadata service answers, read again whenever it changes
	STS    *STS        `yaml:"sts"`
}

// StaticKeys are credentials as they are. Without Expiration they are said to
// expire six hours after each request, since clients insist on a date.
type StaticKeys struct {
	AccessKeyID     string    `yaml:"access-key-id"`
	SecretAccessKey string    `yaml:"secret-access-key"`
	Token           string    `yaml:"session-token"`
	Expiration      time.Time `yaml:"expiration"`
}

// STS mints credentials with AssumeRole, as MinIO and AWS offer it.
type STS struct {
	Endpoint        string   `yaml:"endpoint"`
	Region          string   `yaml:"region"` // default us-east-1
	RoleARN         string   `yaml:"role-arn"`
	SessionName     string   `yaml:"session-name"` // default: the instance id
	Policy          string   `yaml:"policy"`       // inline policy, JSON
	Duration        Duration `yaml:"duration"`     // 15m - 12h, default 1h
	AccessKeyID     string   `yaml:"access-key-id"`
	SecretAccessKey string   `yaml:"secret-access-key"`
	SecretFile      string   `yaml:"secret-access-key-file"`
	CACert          string   `yaml:"ca-cert"` // PEM
}

// Duration is a time.Duration that YAML and JSON carry as "1h30m".
type Duration time.Duration

// UnmarshalText reads what time.ParseDuration does.
func (d *Duration) UnmarshalText(text []byte) error {
	v, err := time.ParseDuration(string(text))
	*d = Duration(v)
	return err
}

// MarshalText writes what UnmarshalText reads.
func (d Duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }

// Events are what happens to an instance while it runs.
type Events struct {
	SpotAction  *SpotAction  `yaml:"spot" json:"spot,omitempty"`
	Rebalance   *time.Time   `yaml:"rebalance" json:"rebalance,omitempty"` // the notice's time
	Lifecycle   string       `yaml:"target-lifecycle-state" json:"target-lifecycle-state,omitempty"`
	Maintenance *Maintenance `yaml:"maintenance" json:"maintenance,omitempty"`
}

// SpotAction is a spot interruption notice.
type SpotAction struct {
	Action string    `yaml:"action" json:"action"` // stop, terminate, hibernate
	Time   time.Time `yaml:"time" json:"time"`
}

// Maintenance are the scheduled and the past maintenance events.
type Maintenance struct {
	Scheduled []MaintenanceEvent `yaml:"scheduled" json:"scheduled,omitempty"`
	History   []MaintenanceEvent `yaml:"history" json:"history,omitempty"`
}

// MaintenanceEvent is one entry of events/maintenance.
type MaintenanceEvent struct {
	ID          string    `yaml:"event-id" json:"event-id"`
	Code        string    `yaml:"code" json:"code"`
	Description string    `yaml:"description" json:"description"`
	State       string    `yaml:"state" json:"state"` // active, completed, canceled
	NotBefore   time.Time `yaml:"not-before" json:"not-before"`
	NotAfter    time.Time `yaml:"not-after" json:"not-after,omitzero"`
}
