package ota

// Severity says how much a [Finding] matters.
type Severity string

// The severities.
const (
	Critical Severity = "critical" // a firmware that does not work may never be rolled back
	Warning  Severity = "warning"  // in some cases it is not, or only after a long time
	Note     Severity = "note"     // worth knowing
)

// Finding is something about the machine that may stand in the way of a rollback.
// Package boot/health finds some.
type Finding struct {
	ID       string   `json:"id"` // a word for programs; it does not change between releases
	Severity Severity `json:"severity"`
	What     string   `json:"what"`   // a sentence for people
	Remedy   string   `json:"remedy"` // what to do about it, "" if there is nothing to be done
}
