package catalog

import (
	"maps"
	"slices"
	"time"
	"unique"
)

// Image is the record of one image. Names and values are EC2's where EC2 has
// them. Records that a [View] gives are shared: change a [Image.Clone].
// Texts are empty, times zero, where nothing is known.
type Image struct {
	ID       string `json:"id"`       // "ami-", "aki-" or "ari-" and 17 hex digits; never used again
	Revision int64  `json:"revision"` // 1 when registered, one more with every change

	Name        string `json:"name,omitempty"` // unique per owner among the registered ones
	Description string `json:"description,omitempty"`
	Owner       string `json:"owner"` // account: 12 digits
	State       State  `json:"state"`
	Reason      Reason `json:"reason,omitzero"` // of state failed, mostly

	// What is registered. Kind bundle: BUCKET/PREFIX/NAME.manifest.xml in the
	// region. Kind instar: IMAGE@MANIFEST, all 64 digits, in the catalog's own
	// store. Kind none: an image of which only the record is kept (ebs).
	Kind     Kind   `json:"kind"`
	Location string `json:"location,omitempty"`
	Digest   string `json:"digest,omitempty"` // hex SHA-256 of the manifest object as it was verified
	Signer   string `json:"signer,omitempty"` // fingerprint of the key that signed the manifest, if that was checked
	Size     int64  `json:"size,omitempty"`   // bytes of the disk
	Stored   int64  `json:"stored,omitempty"` // bytes in the store, shared ones included
	Added    int64  `json:"added,omitempty"`  // bytes that this image added to the store (instar)

	Architecture       string        `json:"architecture"`       // i386, x86_64, arm64, x86_64_mac, arm64_mac
	Type               string        `json:"type"`               // machine, kernel, ramdisk
	Platform           string        `json:"platform,omitempty"` // windows, or ""
	PlatformDetails    string        `json:"platform_details"`   // Linux/UNIX
	UsageOperation     string        `json:"usage_operation"`    // RunInstances
	RootDeviceType     string        `json:"root_device_type"`   // instance-store, ebs
	RootDeviceName     string        `json:"root_device_name,omitempty"`
	VirtualizationType string        `json:"virtualization_type"` // hvm, paravirtual
	Hypervisor         string        `json:"hypervisor"`          // xen, ovm
	Kernel             string        `json:"kernel,omitempty"`    // aki-…
	Ramdisk            string        `json:"ramdisk,omitempty"`   // ari-…
	BootMode           string        `json:"boot_mode,omitempty"` // legacy-bios, uefi, uefi-preferred
	TpmSupport         string        `json:"tpm_support,omitempty"`
	ImdsSupport        string        `json:"imds_support,omitempty"`
	SriovNetSupport    string        `json:"sriov_net_support,omitempty"`
	UefiData           string        `json:"uefi_data,omitempty"`
	EnaSupport         bool          `json:"ena_support,omitempty"`
	BlockDevices       []BlockDevice `json:"block_devices,omitempty"`
	ProductCodes       []ProductCode `json:"product_codes,omitempty"`
	BillingProducts    []string      `json:"billing_products,omitempty"`

	Tags Tags `json:"tags,omitempty"`

	// Launch permissions; the owner has his always.
	Public         bool     `json:"public,omitempty"`
	LaunchAccounts []string `json:"launch_accounts,omitempty"` // ascending
	LaunchOrgs     []string `json:"launch_orgs,omitempty"`     // organizations' ARNs, ascending
	LaunchOrgUnits []string `json:"launch_org_units,omitempty"`

	Created      time.Time `json:"created"`             // UTC, whole seconds, as all times here
	Deprecated   time.Time `json:"deprecated,omitzero"` // deprecation time: from then on others do not see it in lists
	Deregistered time.Time `json:"deregistered,omitzero"`
	LastLaunched time.Time `json:"last_launched,omitzero"`

	// Protection against deregistration: "" (disabled), enabled-without-cooldown,
	// enabled-with-cooldown. ProtectedUntil is the end of a cooldown after it
	// was disabled.
	Protection     string    `json:"protection,omitempty"`
	ProtectedUntil time.Time `json:"protected_until,omitzero"`

	SourceImage    string `json:"source_image,omitempty"` // ancestry
	SourceRegion   string `json:"source_region,omitempty"`
	SourceInstance string `json:"source_instance,omitempty"`
	SourceObject   string `json:"source_object,omitempty"` // BUCKET/KEY of the one object that it is restored from

	GettingStarted string      `json:"getting_started,omitempty"` // plain text or Markdown, lines
	Parameters     []Parameter `json:"parameters,omitempty"`      // asked for at launch
	Files          []File      `json:"files,omitempty"`           // put in at start

	History []Change `json:"history,omitempty"` // oldest first; the first and the newest 31
}

// Kind is what an image consists of.
type Kind string

// The kinds of image.
const (
	KindBundle Kind = "bundle"
	KindInstar Kind = "instar"
	KindNone   Kind = "none"
)

// State is an image's imageState.
type State string

// The states: pending becomes available or failed; available and disabled
// change into each other; deregistered is the end of all.
const (
	Pending      State = "pending"
	Available    State = "available"
	Failed       State = "failed"
	Disabled     State = "disabled"
	Deregistered State = "deregistered"
)

// Reason is EC2's stateReason.
type Reason struct {
	Code    string `json:"code"`
	Message string `json:"message"`
}

// BlockDevice is an entry of a block device mapping: a virtual device, an EBS
// volume, or a device left out.
type BlockDevice struct {
	Device   string `json:"device"`
	Virtual  string `json:"virtual,omitempty"`
	NoDevice bool   `json:"no_device,omitempty"`
	EBS      *EBS   `json:"ebs,omitempty"`
}

// EBS is the volume of a block device mapping.
type EBS struct {
	SnapshotID          string `json:"snapshot_id,omitempty"`
	VolumeSize          int64  `json:"volume_size,omitempty"` // GiB
	VolumeType          string `json:"volume_type,omitempty"`
	DeleteOnTermination bool   `json:"delete_on_termination,omitempty"`
	Encrypted           bool   `json:"encrypted,omitempty"`
	IOPS                int64  `json:"iops,omitempty"`
	Throughput          int64  `json:"throughput,omitempty"` // MiB/s
	KmsKeyID            string `json:"kms_key_id,omitempty"`
}

// ProductCode is a product code and its type, devpay or marketplace.
type ProductCode struct {
	Code string `json:"code"`
	Type string `json:"type"`
}

// Tags are a resource's tags by key.
type Tags map[string]string

// Sorted gives the keys in order.
func (t Tags) Sorted() []string { return slices.Sorted(maps.Keys(t)) }

// Parameter is something the image wants to be told when it is launched.
type Parameter struct {
	Name     string   `json:"name"` // as of an environment variable
	Type     string   `json:"type"` // string, integer, boolean, choice, secret
	Default  string   `json:"default,omitempty"`
	Required bool     `json:"required,omitempty"`
	Choices  []string `json:"choices,omitempty"` // of type choice
	Help     string   `json:"help,omitempty"`
}

// File is put into an instance at its start.
type File struct {
	Path     string `json:"path"`            // absolute
	Mode     string `json:"mode,omitempty"`  // octal; default 0644
	Owner    string `json:"owner,omitempty"` // USER or USER:GROUP; default root:root
	Content  []byte `json:"content"`
	Template bool   `json:"template,omitempty"` // ${NAME} in the content is the parameter's value
}

// Change is an entry of an image's history.
type Change struct {
	Time     time.Time `json:"time"`
	Revision int64     `json:"revision"`
	Action   string    `json:"action"` // RegisterImage, CreateTags …
	Account  string    `json:"account"`
	By       string    `json:"by,omitempty"`     // who did it in that account's name: a key's fingerprint, an access key's id
	Detail   string    `json:"detail,omitempty"` // one line
}

// maxHistory is how many changes a record keeps.
const maxHistory = 32

// share keeps one copy of the texts that many records have alike, which makes the
// records of a large catalog smaller, and faster to go through.
func (m *Image) share() {
	for _, s := range []*string{
		&m.Owner, &m.Architecture, &m.Type, &m.Platform, &m.PlatformDetails, &m.UsageOperation, &m.RootDeviceType, &m.RootDeviceName,
		&m.VirtualizationType, &m.Hypervisor, &m.BootMode, &m.TpmSupport, &m.ImdsSupport, &m.SriovNetSupport, &m.SourceRegion, &m.Signer,
		(*string)(&m.State), (*string)(&m.Kind),
	} {
		*s = unique.Make(*s).Value()
	}
	for i := range m.History {
		h := &m.History[i]
		h.Action, h.Account, h.By = unique.Make(h.Action).Value(), unique.Make(h.Account).Value(), unique.Make(h.By).Value()
	}
	for i := range m.BlockDevices {
		b := &m.BlockDevices[i]
		b.Device, b.Virtual = unique.Make(b.Device).Value(), unique.Make(b.Virtual).Value()
	}
	tags := make(Tags, len(m.Tags))
	for k, v := range m.Tags {
		tags[unique.Make(k).Value()] = unique.Make(v).Value()
	}
	if m.Tags != nil {
		m.Tags = tags
	}
}

// Clone is a copy that shares nothing with the record.
func (m *Image) Clone() *Image {
	c := *m
	c.BlockDevices = slices.Clone(m.BlockDevices)
	for i, b := range c.BlockDevices {
		if b.EBS != nil {
			e := *b.EBS
			c.BlockDevices[i].EBS = &e
		}
	}
	c.ProductCodes = slices.Clone(m.ProductCodes)
	c.BillingProducts = slices.Clone(m.BillingProducts)
	c.Tags = maps.Clone(m.Tags)
	c.LaunchAccounts = slices.Clone(m.LaunchAccounts)
	c.LaunchOrgs = slices.Clone(m.LaunchOrgs)
	c.LaunchOrgUnits = slices.Clone(m.LaunchOrgUnits)
	c.Parameters = slices.Clone(m.Parameters)
	for i := range c.Parameters {
		c.Parameters[i].Choices = slices.Clone(m.Parameters[i].Choices)
	}
	c.Files = slices.Clone(m.Files)
	for i := range c.Files {
		c.Files[i].Content = slices.Clone(m.Files[i].Content)
	}
	c.History = slices.Clone(m.History)
	return &c
}

// KeyPair is the public half of an account's key pair. No private half is ever
// stored.
type KeyPair struct {
	ID          string    `json:"id"` // "key-" and 17 hex digits
	Owner       string    `json:"owner"`
	Name        string    `json:"name"`
	Type        string    `json:"type"` // rsa, ed25519
	Fingerprint string    `json:"fingerprint"`
	PublicKey   string    `json:"public_key"` // kind and base64, as in an authorized_keys line
	Created     time.Time `json:"created"`
	Tags        Tags      `json:"tags,omitempty"`
}

// Account is what the catalog knows of an account.
type Account struct {
	ID         string    `json:"id"`                   // 12 digits
	Alias      string    `json:"alias,omitempty"`      // such as amazon or self-made; unique
	Recipients []string  `json:"recipients,omitempty"` // age and SSH public keys that images shared with it are wrapped for
	Created    time.Time `json:"created"`
}
