//! Answers for certificates that tests need, good and bad.

use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams,
    SerialNumber,
};

/// Who signs.
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

/// Days from now, from and until which a certificate is good.
type Days = (i64, i64);

impl Authority {
    pub fn new(name: &str) -> Authority {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        Authority(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    /// Takes back what has this serial number.
    #[allow(dead_code)] // Not all who include this do.
    pub fn revoke(&self, dir: &Path, serial: u64) {
        let now = time::OffsetDateTime::now_utc();
        let list = CertificateRevocationListParams {
            this_update: now - time::Duration::days(1),
            next_update: now + time::Duration::days(10),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: vec![RevokedCertParams {
                serial_number: SerialNumber::from(serial),
                revocation_time: now - time::Duration::hours(1),
                reason_code: None,
                invalidity_date: None,
            }],
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let list = list.signed_by(&self.0).unwrap();
        std::fs::write(dir.join("ca-crl.pem"), list.pem().unwrap()).unwrap();
    }

    fn sign(&self, (dir, what): (&Path, &str), name: &str, days: Days) {
        let key = KeyPair::generate().unwrap();
        let mut params =
            CertificateParams::new(vec![name.to_owned(), "127.0.0.1".to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages = vec![match what {
            "server" => ExtendedKeyUsagePurpose::ServerAuth,
            _ => ExtendedKeyUsagePurpose::ClientAuth,
        }];
        params.serial_number = Some(SerialNumber::from(if what == "server" { 7 } else { 8 }));
        let now = time::OffsetDateTime::now_utc();
        params.not_before = now + time::Duration::days(days.0);
        params.not_after = now + time::Duration::days(days.1);
        let signed = params.signed_by(&key, &self.0).unwrap();
        std::fs::write(dir.join("ca-cert.pem"), self.0.pem()).unwrap();
        std::fs::write(dir.join(format!("{what}-cert.pem")), signed.pem()).unwrap();
        std::fs::write(dir.join(format!("{what}-key.pem")), key.serialize_pem()).unwrap();
    }

    pub fn server(&self, dir: &Path, name: &str, days: Days) {
        self.sign((dir, "server"), name, days);
    }

    #[allow(dead_code)] // As above.
    pub fn client(&self, dir: &Path, name: &str, days: Days) {
        self.sign((dir, "client"), name, days);
    }
}
