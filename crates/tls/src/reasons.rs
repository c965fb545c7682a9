//! Answers for what went wrong in TLS, in words that say who has to do what.

use rustls::{AlertDescription, CertificateError, Error, InvalidMessage};

/// Why a connection could not be made, or could not go on. `theirs` is what the peer is called:
/// "the client", "the server".
pub(crate) fn reason(error: &Error, theirs: &str) -> String {
    match error {
        Error::InvalidCertificate(what) => format!("{theirs}'s certificate {}", certificate(what)),
        Error::NoCertificatesPresented => format!("{theirs} has shown no certificate"),
        Error::InvalidMessage(InvalidMessage::InvalidContentType) => {
            format!("{theirs} speaks no TLS")
        }
        Error::AlertReceived(alert) => format!("{theirs} says: {}", said(*alert)),
        Error::PeerIncompatible(what) => {
            format!("{theirs} has no version or cipher of TLS in common with us ({what:?})")
        }
        other => format!("{theirs}: {other}"),
    }
}

fn certificate(error: &CertificateError) -> String {
    match error {
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            "has expired (or this machine's clock is wrong)".to_owned()
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "is not valid yet (or this machine's clock is wrong)".to_owned()
        }
        CertificateError::Revoked => "has been revoked".to_owned(),
        CertificateError::UnknownIssuer => "is by no authority that is trusted here".to_owned(),
        CertificateError::NotValidForName => "is for another name".to_owned(),
        CertificateError::NotValidForNameContext { expected, presented } => {
            let presented = match presented.is_empty() {
                true => "no name (it has no subjectAltName)".to_owned(),
                false => presented.join(", "),
            };
            format!("is not for {}, but for {presented}", expected.to_str())
        }
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            "is not for this side of a connection (extended key usage)".to_owned()
        }
        other => format!("is not accepted: {other}"),
    }
}

fn said(alert: AlertDescription) -> String {
    let words = match alert {
        AlertDescription::CertificateExpired => "your certificate has expired",
        AlertDescription::CertificateRevoked => "your certificate has been revoked",
        AlertDescription::UnknownCA => "your certificate is by no authority that I trust",
        AlertDescription::BadCertificate | AlertDescription::CertificateUnknown => {
            "your certificate is not accepted"
        }
        AlertDescription::CertificateRequired => "you have to show a certificate",
        AlertDescription::HandshakeFailure => {
            "no version, cipher or certificate suits both (one without certificates, by PSK?)"
        }
        AlertDescription::UserCanceled => "cancelled",
        other => return format!("{other:?}"),
    };
    words.to_owned()
}
