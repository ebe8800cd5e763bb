package ec2api

import (
	"cmp"
	"context"
	"slices"

	"github.com/instar-image/instar/upload/catalog"
)

type createKeyPair struct {
	dry
	KeyName          string `q:"KeyName!"`
	KeyType          string
	KeyFormat        string
	TagSpecification []tagSpecification
}

type keyPairReply struct {
	head
	KeyName        string          `xml:"keyName"`
	KeyFingerprint string          `xml:"keyFingerprint"`
	KeyMaterial    string          `xml:"keyMaterial,omitempty"`
	KeyPairID      string          `xml:"keyPairId"`
	TagSet         *items[tagItem] `xml:"tagSet"`
}

func newKeyPairReply(k *catalog.KeyPair, material string) *keyPairReply {
	return &keyPairReply{KeyName: k.Name, KeyFingerprint: k.Fingerprint, KeyMaterial: material, KeyPairID: k.ID, TagSet: someOf(newTags(k.Tags))}
}

func (s *Server) createKeyPair(ctx context.Context, c *call, in *createKeyPair) (reply, error) {
	tags, err := tagsOf(in.TagSpecification, "key-pair")
	if err != nil {
		return nil, err
	}
	switch in.KeyFormat {
	case "", "pem":
	case "ppk":
		return nil, refuse(catalog.CodeParameterValue, "KeyFormat ppk is not supported: take pem, and 'puttygen FILE -O private' makes the other of it")
	default:
		return nil, refuse(catalog.CodeParameterValue, "KeyFormat must be pem")
	}
	k, material, err := s.o.Catalog.CreateKeyPair(ctx, c.as(in.DryRun), in.KeyName, cmp.Or(in.KeyType, "rsa"), tags)
	if err != nil {
		return nil, err
	}
	return newKeyPairReply(k, string(material)), nil
}

type importKeyPair struct {
	dry
	KeyName           string `q:"KeyName!"`
	PublicKeyMaterial blob   `q:"PublicKeyMaterial!"`
	TagSpecification  []tagSpecification
}

func (s *Server) importKeyPair(ctx context.Context, c *call, in *importKeyPair) (reply, error) {
	tags, err := tagsOf(in.TagSpecification, "key-pair")
	if err != nil {
		return nil, err
	}
	k, err := s.o.Catalog.ImportKeyPair(ctx, c.as(in.DryRun), in.KeyName, in.PublicKeyMaterial, tags)
	if err != nil {
		return nil, err
	}
	return newKeyPairReply(k, ""), nil
}

type describeKeyPairs struct {
	dry
	KeyName          []string
	KeyPairID        []string `q:"KeyPairId"`
	IncludePublicKey bool
	Filter           []filter
}

type keyPairItem struct {
	KeyPairID      string          `xml:"keyPairId"`
	KeyName        string          `xml:"keyName"`
	KeyType        string          `xml:"keyType"`
	KeyFingerprint string          `xml:"keyFingerprint"`
	PublicKey      string          `xml:"publicKey,omitempty"`
	CreateTime     string          `xml:"createTime"`
	TagSet         *items[tagItem] `xml:"tagSet"`
}

type describeKeyPairsReply struct {
	head
	KeySet items[keyPairItem] `xml:"keySet"`
}

// keyPairs are an account's, by id.
func keyPairs(ctx context.Context, v *catalog.View, owner string) ([]*catalog.KeyPair, error) {
	var out []*catalog.KeyPair
	for k, err := range v.KeyPairs(ctx, owner) {
		if err != nil {
			return nil, err
		}
		out = append(out, k)
	}
	slices.SortFunc(out, func(a, b *catalog.KeyPair) int { return cmp.Compare(a.ID, b.ID) })
	return out, nil
}

func (s *Server) describeKeyPairs(ctx context.Context, c *call, in *describeKeyPairs) (reply, error) {
	match, err := newMatcher(in.Filter, "key-name", "key-pair-id", "fingerprint", "tag-key", "tag-value", "tag:")
	if err != nil {
		return nil, err
	}
	out := &describeKeyPairsReply{}
	err = s.o.Catalog.Read(ctx, func(v *catalog.View) error {
		all, err := keyPairs(ctx, v, c.account.id)
		if err != nil {
			return err
		}
		for _, n := range in.KeyName {
			if !slices.ContainsFunc(all, func(k *catalog.KeyPair) bool { return k.Name == n }) {
				return refuse(catalog.CodeKeyNotFound, "The key pair '%.255s' does not exist", n)
			}
		}
		for _, id := range in.KeyPairID {
			if !slices.ContainsFunc(all, func(k *catalog.KeyPair) bool { return k.ID == id }) {
				return refuse(catalog.CodeKeyNotFound, "The key pair with the id '%.255s' does not exist", id)
			}
		}
		out.KeySet = items[keyPairItem]{}
		for _, k := range all {
			asked := len(in.KeyName)+len(in.KeyPairID) == 0 || slices.Contains(in.KeyName, k.Name) || slices.Contains(in.KeyPairID, k.ID)
			if !asked || !match.all(func(name string) []string { return keyPairField(k, name) }) {
				continue
			}
			item := keyPairItem{KeyPairID: k.ID, KeyName: k.Name, KeyType: k.Type, KeyFingerprint: k.Fingerprint, CreateTime: timestamp(k.Created), TagSet: someOf(newTags(k.Tags))}
			if in.IncludePublicKey {
				item.PublicKey = k.PublicKey + " " + k.Name + "\n"
			}
			out.KeySet.Item = append(out.KeySet.Item, item)
		}
		return nil
	})
	return out, err
}

func keyPairField(k *catalog.KeyPair, name string) []string {
	switch name {
	case "key-name":
		return []string{k.Name}
	case "key-pair-id":
		return []string{k.ID}
	case "fingerprint":
		return []string{k.Fingerprint}
	}
	return tagField(k.Tags, name)
}

type deleteKeyPair struct {
	dry
	KeyName   string
	KeyPairID string `q:"KeyPairId"`
}

type deleteKeyPairReply struct {
	head
	Return    bool   `xml:"return"`
	KeyPairID string `xml:"keyPairId,omitempty"`
}

func (s *Server) deleteKeyPair(ctx context.Context, c *call, in *deleteKeyPair) (reply, error) {
	if (in.KeyName == "") == (in.KeyPairID == "") {
		return nil, refuse(catalog.CodeMissing, "The request must contain either keyName or keyPairId")
	}
	gone, err := s.o.Catalog.DeleteKeyPair(ctx, c.as(in.DryRun), in.KeyName, in.KeyPairID)
	if err != nil {
		return nil, err
	}
	out := &deleteKeyPairReply{Return: true}
	if gone != nil {
		out.KeyPairID = gone.ID
	}
	return out, nil
}
