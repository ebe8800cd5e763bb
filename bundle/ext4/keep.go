package ext4

// kept are the places of a plan that keeps those of its parent.
type kept struct{ *places }
